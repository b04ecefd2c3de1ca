/* Norm, SwiGLU and rotation of bfloat16 on a CPU: one pass over memory forward and one backward, where
   the plain forms of kernels.py take three to eight; and the head's scores. c_layers.py compiles and
   calls it.

   All compute in float32, add long rows in double, and round once. Rows are computed each for itself,
   so the number of threads changes nothing. `stride` is the distance of two rows; a row's own numbers
   lie side by side. */

#include <math.h>
#include <stdint.h>

typedef uint16_t bf16;
typedef union { float f; uint32_t u; int32_t i; } word;

static inline float wide_b(bf16 x) { word w = {.u = (uint32_t)x << 16}; return w.f; }
static inline float wide_f(float x) { return x; }

/* To the nearest bfloat16, ties to the even one. */
static inline bf16 round_b(float x) {
    word w = {.f = x};
    uint32_t near = (w.u + 0x7fff + (w.u >> 16 & 1)) >> 16;
    return (w.u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near; /* not a number */
}
static inline float round_f(float x) { return x; }

/* e^x within 2 units in the last place, by operations that vectorize: 2^n times a polynomial of the
   rest, as in Cephes. */
static inline float exp_of(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    word power = {.i = ((int32_t)n + 127) << 23};
    return (p * r * r + r + 1) * power.f;
}

/* y = x r w with r = 1 / sqrt(mean(x^2) + eps), kept in `rstd`; X is the type of x. */
#define NORM(X, x_)                                                                                \
void norm_##x_(const X *x, const float *w, bf16 *y, float *rstd, int64_t rows, int64_t columns,    \
               int64_t stride, float eps, int threads) {                                           \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t i = 0; i < rows; i++) {                                                           \
        const X *in = x + i * stride;                                                              \
        bf16 *out = y + i * columns;                                                               \
        double sum = 0;                                                                            \
        _Pragma("omp simd reduction(+ : sum)")                                                     \
        for (int64_t j = 0; j < columns; j++) sum += wide_##x_(in[j]) * wide_##x_(in[j]);          \
        float r = rstd[i] = 1 / sqrt(sum / columns + eps);                                         \
        _Pragma("omp simd")                                                                        \
        for (int64_t j = 0; j < columns; j++) out[j] = round_b(wide_##x_(in[j]) * r * w[j]);       \
    }                                                                                              \
}
NORM(bf16, b)
NORM(float, f)

/* dx = r (g - n mean(g n)) with g = dy w and n = x r; dw is the sum over rows of dy n. Each `block` of
   rows has a sum of its own in `sums`, and these are added in order. */
#define NORM_BACKWARD(X, x_)                                                                       \
void norm_backward_##x_(const bf16 *dy, const X *x, const float *w, const float *rstd, X *dx,      \
                        float *dw, float *sums, int64_t block, int64_t rows, int64_t columns,      \
                        int64_t stride, int threads) {                                             \
    int64_t blocks = (rows + block - 1) / block;                                                   \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t b = 0; b < blocks; b++) {                                                         \
        float *sum = sums + b * columns;                                                           \
        for (int64_t j = 0; j < columns; j++) sum[j] = 0;                                          \
        int64_t end = (b + 1) * block < rows ? (b + 1) * block : rows;                             \
        for (int64_t i = b * block; i < end; i++) {                                                \
            const X *in = x + i * stride;                                                          \
            const bf16 *up = dy + i * columns;                                                     \
            X *out = dx + i * columns;                                                             \
            float r = rstd[i], mean = 0;                                                           \
            _Pragma("omp simd reduction(+ : mean)")                                                \
            for (int64_t j = 0; j < columns; j++) {                                                \
                float g = wide_b(up[j]), n = wide_##x_(in[j]) * r;                                 \
                sum[j] += g * n;                                                                   \
                mean += g * w[j] * n;                                                              \
            }                                                                                      \
            mean /= columns;                                                                       \
            _Pragma("omp simd")                                                                    \
            for (int64_t j = 0; j < columns; j++) {                                                \
                float g = wide_b(up[j]) * w[j], n = wide_##x_(in[j]) * r;                          \
                out[j] = round_##x_(r * (g - n * mean));                                           \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    for (int64_t j = 0; j < columns; j++) {                                                        \
        double sum = 0;                                                                            \
        for (int64_t b = 0; b < blocks; b++) sum += sums[b * columns + j];                         \
        dw[j] = sum;                                                                               \
    }                                                                                              \
}
NORM_BACKWARD(bf16, b)
NORM_BACKWARD(float, f)

/* y = silu(gate) up, with silu(a) = a / (1 + e^-a). */
void swiglu(const bf16 *gate, const bf16 *up, bf16 *y, int64_t rows, int64_t columns, int64_t stride,
            int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *a = gate + i * stride, *b = up + i * stride;
        bf16 *out = y + i * columns;
        #pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float v = wide_b(a[j]);
            out[j] = round_b(v / (1 + exp_of(-v)) * wide_b(b[j]));
        }
    }
}

/* dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, with s = 1 / (1 + e^-gate). */
void swiglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *up, bf16 *dgate, bf16 *dup,
                     int64_t rows, int64_t columns, int64_t stride, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *a = gate + i * stride, *b = up + i * stride, *g = dy + i * columns;
        bf16 *da = dgate + i * columns, *db = dup + i * columns;
        #pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float v = wide_b(a[j]), d = wide_b(g[j]), s = 1 / (1 + exp_of(-v));
            da[j] = round_b(d * wide_b(b[j]) * s * (1 + v * (1 - s)));
            db[j] = round_b(d * v * s);
        }
    }
}

/* (a cos - b sin, b cos + a sin) of the halves (a, b) of each head; `sign` -1 rotates back. A token
   has `heads` heads and one row of each table. */
#define ROTATION(name, X, x_, Y, y_)                                                               \
void name(const X *x, const float *cos, const float *sin, Y *y, int64_t tokens, int64_t heads,     \
          int64_t size, int64_t stride, float sign, int threads) {                                 \
    int64_t half = size / 2;                                                                       \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t t = 0; t < tokens; t++) {                                                         \
        const float *c = cos + t * size, *s = sin + t * size;                                      \
        for (int64_t h = 0; h < heads; h++) {                                                      \
            const X *a = x + t * stride + h * size, *b = a + half;                                 \
            Y *out = y + (t * heads + h) * size;                                                   \
            _Pragma("omp simd")                                                                    \
            for (int64_t j = 0; j < half; j++) {                                                   \
                float u = wide_##x_(a[j]), v = wide_##x_(b[j]);                                    \
                out[j] = round_##y_(u * c[j] - sign * v * s[j]);                                   \
                out[half + j] = round_##y_(v * c[half + j] + sign * u * s[j]);                     \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
}
ROTATION(rotation, bf16, b, float, f)
ROTATION(rotation_backward, float, f, bf16, b)

/* Of each row of logits x: log p of its target, and with `statistics` entropy, log sum p^2, mean logit
   and whether the target is the largest, p = e^(x - top) / sum. With `slopes` the row becomes
   onehot(target) - p, times 1 - (x / cap)^2 if `cap` is not 0: then x came out of cap tanh. Sums of
   256 are added in double: a vocabulary is long. */
void score(bf16 *logits, const int64_t *targets, float *logp, float *entropy, float *log_sum_sq,
           float *mean, uint8_t *is_top, int64_t rows, int64_t columns, int64_t statistics,
           int64_t slopes, float cap, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        bf16 *x = logits + i * columns;
        float target = wide_b(x[targets[i]]), top = target;
        #pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < columns; j++) top = wide_b(x[j]) > top ? wide_b(x[j]) : top;
        double sum = 0, moment = 0, squares = 0, all = 0;
        for (int64_t from = 0; from < columns; from += 256) {
            int64_t to = from + 256 < columns ? from + 256 : columns;
            float s = 0, m = 0, q = 0, a = 0;
            if (statistics) {
                #pragma omp simd reduction(+ : s, m, q, a)
                for (int64_t j = from; j < to; j++) {
                    float d = wide_b(x[j]) - top, e = exp_of(d);
                    s += e, m += e * d, q += e * e, a += wide_b(x[j]);
                }
            } else {
                #pragma omp simd reduction(+ : s)
                for (int64_t j = from; j < to; j++) s += exp_of(wide_b(x[j]) - top);
            }
            sum += s, moment += m, squares += q, all += a;
        }
        logp[i] = target - top - log(sum);
        if (statistics) {
            entropy[i] = log(sum) - moment / sum;
            log_sum_sq[i] = log(squares) - 2 * log(sum);
            mean[i] = all / columns;
            is_top[i] = target == top;
        }
        if (!slopes) continue;
        float scale = 1 / sum, bend = cap ? 1 / (cap * cap) : 0;
        #pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float v = wide_b(x[j]);
            x[j] = round_b(-exp_of(v - top) * scale * (1 - v * v * bend));
        }
        x[targets[i]] = round_b((1 - exp_of(target - top) * scale) * (1 - target * target * bend));
    }
}
