// The tokens at some quantiles of softmax(z / temperature), and log sum exp(z / temperature), in float64.  `draw.py` has the
// definitions.
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1024 };  // columns whose sum is kept: the token is looked for in one of them

// exp for x <= 0 to 1e-15, relative: 2^n e^r with |r| <= ln 2 / 2, the Taylor series to r^13; 0 below 1e-304.
static inline double exp_(double x) {
    const double shift = 0x1.8p52, t = x * 1.4426950408889634 + shift, n = t - shift;  // the low bits of t are n
    const double r = (x - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
    double p = 1.6059043836821613e-10;
    p = p * r + 2.0876756987868099e-9;
    p = p * r + 2.5052108385441720e-8;
    p = p * r + 2.7557319223985888e-7;
    p = p * r + 2.7557319223985893e-6;
    p = p * r + 2.4801587301587302e-5;
    p = p * r + 1.9841269841269841e-4;
    p = p * r + 1.3888888888888889e-3;
    p = p * r + 8.3333333333333332e-3;
    p = p * r + 4.1666666666666664e-2;
    p = p * r + 1.6666666666666666e-1;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &t, 8);
    bits = (bits + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, 8);
    return x < -700.0 ? 0.0 : p * scale;
}

static float largest(const float *restrict z, int64_t width) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < width; j++) most = most < z[j] ? z[j] : most;
    return most;
}

// sums: room for one number a block.
void draw(const float *logits, int64_t stride, int64_t rows, int64_t width, int64_t draws, double temperature, const double *noise,
          double *sums, int64_t *ids, double *whole) {
    const double cold = 1 / temperature;
    for (int64_t i = 0; i < rows; i++) {
        const float *restrict z = logits + i * stride;
        const double most = largest(z, width);
        double total = 0;
        for (int64_t start = 0, k = 0; start < width; start += BLOCK, k++) {
            const int64_t end = start + BLOCK < width ? start + BLOCK : width;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = start; j < end; j++) sum += exp_((z[j] - most) * cold);
            sums[k] = sum;
            total += sum;
        }
        whole[i] = most * cold + log(total);
        for (int64_t n = i * draws; n < (i + 1) * draws; n++) {
            const double target = noise[n] * total;
            double below = 0;
            int64_t j = 0;
            for (int64_t k = 0; j + BLOCK < width && below + sums[k] <= target; k++, j += BLOCK) below += sums[k];
            for (; j < width; j++)
                if ((below += exp_((z[j] - most) * cold)) > target) break;
            if (j == width)  // rounding put the quantile beyond the end: the last token of positive probability
                for (j = width - 1; j > 0 && exp_((z[j] - most) * cold) == 0;) j--;
            ids[n] = j;
        }
    }
}
