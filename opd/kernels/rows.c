// One sweep over rows of both models' logits; the student's become exp(z - max z).  `rows.py` has the definitions.
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, BLOCK = 1024 };  // partial maxima side by side; columns summed in fp32 before the double takes over

// exp for x <= 0 to 2 units in the last place (Cephes); 0 below the normal numbers, nan for nan.
static inline float exp_(float x) {
    float n = rintf(x * 1.44269504f);
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

// sums: e, eu, ev, f, fv, u, v of each row, seven rows of `stride`.
void sweep(float *restrict student, const float *restrict teacher, const int64_t *ids, float *sums, int64_t rows, int64_t width,
           int64_t stride) {
    for (int64_t i = 0; i < rows; i++) {
        float *restrict s = student + i * width;
        const float *restrict t = teacher + i * width;
        const float most = largest(s, width), top = largest(t, width);
        const float u_drawn = s[ids[i]] - most, v_drawn = t[ids[i]] - top;
        double whole[5] = {0};
        for (int64_t start = 0; start < width; start += BLOCK) {
            const int64_t end = start + BLOCK < width ? start + BLOCK : width;
            float e = 0, eu = 0, ev = 0, f = 0, fv = 0;
#pragma omp simd reduction(+ : e, eu, ev, f, fv)
            for (int64_t j = start; j < end; j++) {
                const float u = s[j] - most, v = t[j] - top;
                const float a = exp_(u), b = exp_(v);
                e += a;
                eu += a * u;
                ev += a * v;
                f += b;
                fv += b * v;
                s[j] = a;
            }
            const float part[5] = {e, eu, ev, f, fv};
            for (int k = 0; k < 5; k++) whole[k] += part[k];
        }
        for (int k = 0; k < 5; k++) sums[k * stride + i] = (float)whole[k];
        sums[5 * stride + i] = u_drawn;
        sums[6 * stride + i] = v_drawn;
    }
}
