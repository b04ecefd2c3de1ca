/* Norm, SwiGLU and rotation on a CPU: one pass over memory forward and one backward, where the plain
   forms of kernels.py take three to eight; and the head's scores. c_layers.py compiles and calls it.

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

/* y = x r w with r = 1 / sqrt(mean(x^2) + eps), kept in `rstd`; X and Y are the types of x and y. */
#define NORM(X, x_, Y, y_)                                                                         \
void norm_##x_##y_(const X *x, const float *w, Y *y, float *rstd, int64_t rows, int64_t columns,   \
                   int64_t stride, float eps, int threads) {                                       \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t i = 0; i < rows; i++) {                                                           \
        const X *in = x + i * stride;                                                              \
        Y *out = y + i * columns;                                                                  \
        double sum = 0;                                                                            \
        _Pragma("omp simd reduction(+ : sum)")                                                     \
        for (int64_t j = 0; j < columns; j++) sum += wide_##x_(in[j]) * wide_##x_(in[j]);          \
        float r = rstd[i] = 1 / sqrt(sum / columns + eps);                                         \
        _Pragma("omp simd")                                                                        \
        for (int64_t j = 0; j < columns; j++) out[j] = round_##y_(wide_##x_(in[j]) * r * w[j]);    \
    }                                                                                              \
}

/* dx = r (g - n mean(g n)) with g = dy w and n = x r; dw is the sum over rows of dy n. Each `block` of
   rows has a sum of its own in `sums`, and these are added in order. */
#define NORM_BACKWARD(X, x_, Y, y_)                                                                \
void norm_backward_##x_##y_(const Y *dy, const X *x, const float *w, const float *rstd, X *dx,     \
                            float *dw, float *sums, int64_t block, int64_t rows, int64_t columns,  \
                            int64_t stride, int threads) {                                         \
    int64_t blocks = (rows + block - 1) / block;                                                   \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t b = 0; b < blocks; b++) {                                                         \
        float *sum = sums + b * columns;                                                           \
        for (int64_t j = 0; j < columns; j++) sum[j] = 0;                                          \
        int64_t end = (b + 1) * block < rows ? (b + 1) * block : rows;                             \
        for (int64_t i = b * block; i < end; i++) {                                                \
            const X *in = x + i * stride;                                                          \
            const Y *up = dy + i * columns;                                                        \
            X *out = dx + i * columns;                                                             \
            float r = rstd[i], mean = 0;                                                           \
            _Pragma("omp simd reduction(+ : mean)")                                                \
            for (int64_t j = 0; j < columns; j++) {                                                \
                float g = wide_##y_(up[j]), n = wide_##x_(in[j]) * r;                              \
                sum[j] += g * n;                                                                   \
                mean += g * w[j] * n;                                                              \
            }                                                                                      \
            mean /= columns;                                                                       \
            _Pragma("omp simd")                                                                    \
            for (int64_t j = 0; j < columns; j++) {                                                \
                float g = wide_##y_(up[j]) * w[j], n = wide_##x_(in[j]) * r;                       \
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

/* y = silu(gate) up, with silu(a) = a / (1 + e^-a). */
#define SWIGLU(X, x_)                                                                              \
void swiglu_##x_(const X *gate, const X *up, X *y, int64_t rows, int64_t columns, int64_t stride,  \
                 int threads) {                                                                    \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t i = 0; i < rows; i++) {                                                           \
        const X *a = gate + i * stride, *b = up + i * stride;                                      \
        X *out = y + i * columns;                                                                  \
        _Pragma("omp simd")                                                                        \
        for (int64_t j = 0; j < columns; j++) {                                                    \
            float v = wide_##x_(a[j]);                                                             \
            out[j] = round_##x_(v / (1 + exp_of(-v)) * wide_##x_(b[j]));                           \
        }                                                                                          \
    }                                                                                              \
}

/* dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, with s = 1 / (1 + e^-gate). */
#define SWIGLU_BACKWARD(X, x_)                                                                     \
void swiglu_backward_##x_(const X *dy, const X *gate, const X *up, X *dgate, X *dup, int64_t rows, \
                          int64_t columns, int64_t stride, int threads) {                          \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t i = 0; i < rows; i++) {                                                           \
        const X *a = gate + i * stride, *b = up + i * stride, *g = dy + i * columns;               \
        X *da = dgate + i * columns, *db = dup + i * columns;                                      \
        _Pragma("omp simd")                                                                        \
        for (int64_t j = 0; j < columns; j++) {                                                    \
            float v = wide_##x_(a[j]), d = wide_##x_(g[j]), s = 1 / (1 + exp_of(-v));              \
            da[j] = round_##x_(d * wide_##x_(b[j]) * s * (1 + v * (1 - s)));                       \
            db[j] = round_##x_(d * v * s);                                                         \
        }                                                                                          \
    }                                                                                              \
}

/* (a cos - b sin, b cos + a sin) of the halves (a, b) of each head; `sign` -1 rotates back. A token
   has `heads` heads and one row of each table. */
#define ROTATION(X, x_, Y, y_)                                                                     \
void rotation_##x_##y_(const X *x, const float *cos, const float *sin, Y *y, int64_t tokens,       \
                       int64_t heads, int64_t size, int64_t stride, float sign, int threads) {     \
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

/* Of each row of logits x: log p of its target, and with `statistics` entropy, log sum p^2, mean logit
   and whether the target is the largest, p = e^(x - top) / sum. With `slopes` the row becomes
   onehot(target) - p, times 1 - (x / cap)^2 if `cap` is not 0: then x came out of cap tanh. Sums of
   256 are added in double: a vocabulary is long. */
#define SCORE(X, x_)                                                                               \
void score_##x_(X *logits, const int64_t *targets, float *logp, float *entropy, float *log_sum_sq, \
                float *mean, uint8_t *is_top, int64_t rows, int64_t columns, int64_t statistics,   \
                int64_t slopes, float cap, int threads) {                                          \
    _Pragma("omp parallel for num_threads(threads)")                                               \
    for (int64_t i = 0; i < rows; i++) {                                                           \
        X *x = logits + i * columns;                                                               \
        float target = wide_##x_(x[targets[i]]), top = target;                                     \
        _Pragma("omp simd reduction(max : top)")                                                   \
        for (int64_t j = 0; j < columns; j++) top = wide_##x_(x[j]) > top ? wide_##x_(x[j]) : top; \
        double sum = 0, moment = 0, squares = 0, all = 0;                                          \
        for (int64_t from = 0; from < columns; from += 256) {                                      \
            int64_t to = from + 256 < columns ? from + 256 : columns;                              \
            float s = 0, m = 0, q = 0, a = 0;                                                      \
            if (statistics) {                                                                      \
                _Pragma("omp simd reduction(+ : s, m, q, a)")                                      \
                for (int64_t j = from; j < to; j++) {                                              \
                    float d = wide_##x_(x[j]) - top, e = exp_of(d);                                \
                    s += e, m += e * d, q += e * e, a += wide_##x_(x[j]);                          \
                }                                                                                  \
            } else {                                                                               \
                _Pragma("omp simd reduction(+ : s)")                                               \
                for (int64_t j = from; j < to; j++) s += exp_of(wide_##x_(x[j]) - top);            \
            }                                                                                      \
            sum += s, moment += m, squares += q, all += a;                                         \
        }                                                                                          \
        logp[i] = target - top - log(sum);                                                         \
        if (statistics) {                                                                          \
            entropy[i] = log(sum) - moment / sum;                                                  \
            log_sum_sq[i] = log(squares) - 2 * log(sum);                                           \
            mean[i] = all / columns;                                                               \
            is_top[i] = target == top;                                                             \
        }                                                                                          \
        if (!slopes) continue;                                                                     \
        float scale = 1 / sum, bend = cap ? 1 / (cap * cap) : 0;                                   \
        _Pragma("omp simd")                                                                        \
        for (int64_t j = 0; j < columns; j++) {                                                    \
            float v = wide_##x_(x[j]);                                                             \
            x[j] = round_##x_(-exp_of(v - top) * scale * (1 - v * v * bend));                      \
        }                                                                                          \
        x[targets[i]] = round_##x_((1 - exp_of(target - top) * scale) *                            \
                                   (1 - target * target * bend));                                  \
    }                                                                                              \
}

#define OF_TWO(KERNEL)                                                                             \
    KERNEL(bf16, b, bf16, b) KERNEL(bf16, b, float, f) KERNEL(float, f, bf16, b)                   \
    KERNEL(float, f, float, f)
#define OF_ONE(KERNEL) KERNEL(bf16, b) KERNEL(float, f)
OF_TWO(NORM)
OF_TWO(NORM_BACKWARD)
OF_ONE(SWIGLU)
OF_ONE(SWIGLU_BACKWARD)
OF_TWO(ROTATION)
OF_ONE(SCORE)
