// One sweep over rows of both models' logits; the student's become exp(z - max z).  `closed_forms.py` has the definitions.
#include <math.h>
#include <stdint.h>
#include <string.h>

// A row has LANES partial sums and maxima side by side, however wide the processor's vectors are: its digits do not depend
// on the compiler.  They are fp32 for BLOCK columns at a time; doubles sum the rest.
enum { LANES = 16, BLOCK = 1024 };
enum { E, EU, EUV, F, FV, SUMS };

static const float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in vectors on any processor

// exp for x <= 0 to 2 units in the last place (Cephes); 0 below the normal numbers, nan for nan.
static inline float exp_(float x) {
    float n = (x * 1.44269504f + ROUND) - ROUND;
    n = n < -126.0f ? -126.0f : n;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return x < -87.33f ? 0.0f : p * scale;
}

static float largest(const float *z, int64_t width) {
    float most[LANES], all = -INFINITY;
    for (int k = 0; k < LANES; k++) most[k] = -INFINITY;
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES)
        for (int k = 0; k < LANES; k++) most[k] = most[k] < z[j + k] ? z[j + k] : most[k];
    for (; j < width; j++) all = all < z[j] ? z[j] : all;
    for (int k = 0; k < LANES; k++) all = all < most[k] ? most[k] : all;
    return all;
}

// Replace one logit of the student by e, and add its terms to the partial sums of a lane.
static inline void add(float part[SUMS][LANES], int lane, float *s, float t, float most, float top) {
    const float u = *s - most, v = t - top;
    const float e = exp_(u), f = exp_(v);
    part[E][lane] += e;
    part[EU][lane] += e * u;
    part[EUV][lane] += e * (u - v);
    part[F][lane] += f;
    part[FV][lane] += f * v;
    *s = e;
}

// sums: e, e u, e (u - v), f, f v, u, v of each row, seven rows of `stride`.
void sweep(float *restrict student, const float *restrict teacher, const int64_t *ids, float *sums, int64_t rows, int64_t width,
           int64_t stride) {
    for (int64_t i = 0; i < rows; i++) {
        float *restrict s = student + i * width;
        const float *restrict t = teacher + i * width;
        const float most = largest(s, width), top = largest(t, width);
        const float u_drawn = s[ids[i]] - most, v_drawn = t[ids[i]] - top;
        double whole[SUMS] = {0};
        for (int64_t start = 0; start < width; start += BLOCK) {
            const int64_t end = start + BLOCK < width ? start + BLOCK : width;
            float part[SUMS][LANES] = {{0}};
            int64_t j = start;
            for (; j + LANES <= end; j += LANES)
#pragma omp simd
                for (int k = 0; k < LANES; k++) add(part, k, s + j + k, t[j + k], most, top);
            for (int k = 0; j + k < end; k++) add(part, k, s + j + k, t[j + k], most, top);
            for (int x = 0; x < SUMS; x++)
                for (int k = 0; k < LANES; k++) whole[x] += part[x][k];
        }
        for (int x = 0; x < SUMS; x++) sums[x * stride + i] = (float)whole[x];
        sums[5 * stride + i] = u_drawn;
        sums[6 * stride + i] = v_drawn;
    }
}
