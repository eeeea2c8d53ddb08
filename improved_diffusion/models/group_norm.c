/* Group normalisation and SiLU over channels_last feature maps, forwards and backwards; group_norm.py is its caller.

   x is (samples, positions, channels), of float32 or, compiled with -DBFLOAT16, of bfloat16; weight and bias are float32
   (samples, channels). A sample is gone through twice: for the sums over its positions, and to write the result, when
   it still lies in the cache. Inner loops run over channels, so that compilers make vectors of them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64 /* positions that are summed in float32, before they are added up in float64 */

static inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

#ifdef BFLOAT16
typedef uint16_t element;
static inline float load(element x) { return bits_to_float((uint32_t)x << 16); }
static inline element store(float x) { /* to the nearest, ties to even */
    uint32_t bits = float_to_bits(x);
    return x != x ? 0x7fc0 : (element)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
typedef float element;
static inline float load(element x) { return x; }
static inline element store(float x) { return x; }
#endif

/* 2^i times a polynomial (Cephes, expf), of which a compiler can make vectors; right to the last digit or so. */
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x; /* a NaN stays one */
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer, which is in the low bits */
    float i = shifted - 12582912.0f;
    float r = x - i * 0.693359375f + i * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_to_float((float_to_bits(shifted) + 127) << 23);
}

static inline float sigmoid(float z) { return 1.0f / (1.0f + exponential(-z)); }

/* The derivative by z of what follows the normalisation. */
static inline float slope(float z, int silu) {
    float s = sigmoid(z);
    return silu ? s * (1.0f + z * (1.0f - s)) : 1.0f;
}

/* The normalisation as z = gain * x + offset. */
static void affine_map(const double *mean, const double *rstd, const float *weight, const float *bias, long channels,
                       long groups, float *gain, float *offset) {
    long size = channels / groups;
    for (long c = 0; c < channels; c++) {
        double g = weight[c] * rstd[c / size];
        gain[c] = (float)g;
        offset[c] = (float)(bias[c] - g * mean[c / size]);
    }
}

static void moments(const double *sums, long positions, long channels, long groups, double eps, double *mean,
                    double *rstd) {
    long size = channels / groups;
    double count = (double)size * positions;
    for (long g = 0; g < groups; g++) {
        double sum = 0, square = 0;
        for (long c = g * size; c < (g + 1) * size; c++) sum += sums[c], square += sums[channels + c];
        mean[g] = sum / count;
        double variance = square / count - mean[g] * mean[g];
        rstd[g] = 1 / sqrt((variance < 0 ? 0 : variance) + eps); /* a NaN stays one */
    }
}

static void forward_sample(const element *restrict x, const float *weight, const float *bias, long positions,
                           long channels, long groups, double eps, int silu, element *restrict y, double *mean,
                           double *rstd) {
    double sums[2 * channels];
    float first[channels], second[channels];
    float *restrict a = first, *restrict b = second;
    memset(sums, 0, sizeof(sums));
    for (long start = 0; start < positions; start += BLOCK) {
        long stop = start + BLOCK < positions ? start + BLOCK : positions;
        for (long c = 0; c < channels; c++) a[c] = b[c] = 0;
        for (long p = start; p < stop; p++)
            for (long c = 0; c < channels; c++) {
                float value = load(x[p * channels + c]);
                a[c] += value;
                b[c] += value * value;
            }
        for (long c = 0; c < channels; c++) sums[c] += a[c], sums[channels + c] += b[c];
    }
    moments(sums, positions, channels, groups, eps, mean, rstd);
    affine_map(mean, rstd, weight, bias, channels, groups, a, b);
    for (long p = 0; p < positions; p++)
        if (silu)
            for (long c = 0; c < channels; c++) {
                float z = a[c] * load(x[p * channels + c]) + b[c];
                y[p * channels + c] = store(z * sigmoid(z));
            }
        else
            for (long c = 0; c < channels; c++) y[p * channels + c] = store(a[c] * load(x[p * channels + c]) + b[c]);
}

/* The gradients by x, and by the weight and bias of this sample. With d = grad * slope,

       grad_x = rstd * (weight * d - mean over the group of weight * d - x_hat * mean over it of weight * d * x_hat)

   which is gain * d + slant * x + level, with slant and level constant over a group. */
static void backward_sample(const element *restrict grad, const element *restrict x, const float *weight,
                            const float *bias, const double *mean, const double *rstd, long positions, long channels,
                            long groups, int silu, element *restrict grad_x, float *grad_weight, float *grad_bias) {
    long size = channels / groups;
    double count = (double)size * positions, sums[2 * channels];
    float buffer[6][channels];
    float *restrict gain = buffer[0], *restrict offset = buffer[1], *restrict sum = buffer[2];
    float *restrict product = buffer[3], *restrict slant = buffer[4], *restrict level = buffer[5];
    affine_map(mean, rstd, weight, bias, channels, groups, gain, offset);
    memset(sums, 0, sizeof(sums));
    for (long start = 0; start < positions; start += BLOCK) {
        long stop = start + BLOCK < positions ? start + BLOCK : positions;
        for (long c = 0; c < channels; c++) sum[c] = product[c] = 0;
        for (long p = start; p < stop; p++)
            for (long c = 0; c < channels; c++) {
                float value = load(x[p * channels + c]);
                float d = load(grad[p * channels + c]) * slope(gain[c] * value + offset[c], silu);
                sum[c] += d;
                product[c] += d * value;
            }
        for (long c = 0; c < channels; c++) sums[c] += sum[c], sums[channels + c] += product[c];
    }
    for (long g = 0; g < groups; g++) {
        double by_bias = 0, by_weight = 0;
        for (long c = g * size; c < (g + 1) * size; c++) {
            grad_bias[c] = (float)sums[c];
            double of_weight = rstd[g] * (sums[channels + c] - mean[g] * sums[c]);
            grad_weight[c] = (float)of_weight;
            by_bias += weight[c] * sums[c];
            by_weight += weight[c] * of_weight;
        }
        double b = -rstd[g] * rstd[g] * by_weight / count;
        for (long c = g * size; c < (g + 1) * size; c++) {
            slant[c] = (float)b;
            level[c] = (float)(-rstd[g] * by_bias / count - b * mean[g]);
        }
    }
    for (long p = 0; p < positions; p++)
        for (long c = 0; c < channels; c++) {
            float value = load(x[p * channels + c]);
            float d = load(grad[p * channels + c]) * slope(gain[c] * value + offset[c], silu);
            grad_x[p * channels + c] = store(gain[c] * d + slant[c] * value + level[c]);
        }
}

void forward(const element *x, const float *weight, const float *bias, long samples, long positions, long channels,
             long groups, double eps, int silu, int threads, element *y, double *mean, double *rstd) {
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < samples; n++) {
        long map = n * positions * channels, row = n * channels, group = n * groups;
        forward_sample(x + map, weight + row, bias + row, positions, channels, groups, eps, silu, y + map,
                       mean + group, rstd + group);
    }
}

void backward(const element *grad, const element *x, const float *weight, const float *bias, const double *mean,
              const double *rstd, long samples, long positions, long channels, long groups, int silu, int threads,
              element *grad_x, float *grad_weight, float *grad_bias) {
#pragma omp parallel for num_threads(threads)
    for (long n = 0; n < samples; n++) {
        long map = n * positions * channels, row = n * channels, group = n * groups;
        backward_sample(grad + map, x + map, weight + row, bias + row, mean + group, rstd + group, positions, channels,
                        groups, silu, grad_x + map, grad_weight + row, grad_bias + row);
    }
}
