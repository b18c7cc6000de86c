// What generated kernels lean on. Nothing of the standard library, whose headers take longer to read than kernels.
#pragma once
#include <cstdint>

extern "C" {
void* aligned_alloc(__SIZE_TYPE__, __SIZE_TYPE__) noexcept;
void* malloc(__SIZE_TYPE__) noexcept;
void free(void*) noexcept;
#ifdef _OPENMP
int omp_get_num_threads(void) noexcept;
int omp_get_thread_num(void) noexcept;
#endif
}
#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif

#if defined(__AVX512F__)
#define FM_BYTES 64
#elif defined(__AVX__)
#define FM_BYTES 32
#else
#define FM_BYTES 16
#endif
#define FM_INLINE inline __attribute__((always_inline))

// ---- numbers ----
#define FM_1(name)                                                        \
    FM_INLINE float c_##name(float x) { return __builtin_##name##f(x); } \
    FM_INLINE double c_##name(double x) { return __builtin_##name(x); }
#define FM_2(name)                                                                       \
    FM_INLINE float c_##name(float x, float y) { return __builtin_##name##f(x, y); } \
    FM_INLINE double c_##name(double x, double y) { return __builtin_##name(x, y); }
FM_1(exp)
FM_1(log)
FM_1(log1p)
FM_1(log2)
FM_1(expm1)
FM_1(sqrt)
FM_1(sin)
FM_1(cos)
FM_1(tan)
FM_1(asin)
FM_1(acos)
FM_1(atan)
FM_1(sinh)
FM_1(cosh)
FM_1(tanh)
FM_1(erf)
FM_1(erfc)
FM_1(asinh)
FM_1(acosh)
FM_1(atanh)
FM_1(exp2)
FM_1(log10)
FM_1(floor)
FM_1(ceil)
FM_1(nearbyint)
FM_1(trunc)
FM_1(fabs)
FM_2(pow)
FM_2(atan2)
FM_2(fmod)
template <class S> FM_INLINE S fm_abs(S x) { return x < 0 ? -x : x; }
template <> FM_INLINE float fm_abs(float x) { return __builtin_fabsf(x); }
template <> FM_INLINE double fm_abs(double x) { return __builtin_fabs(x); }
template <class S> FM_INLINE S fm_max(S a, S b) { return (a > b || a != a) ? a : b; }
template <class S> FM_INLINE S fm_min(S a, S b) { return (a < b || a != a) ? a : b; }
template <class S> FM_INLINE S fm_sign(S x) { return S((x > 0) - (x < 0)); }
FM_INLINE int64_t c_fmod(int64_t a, int64_t b) { return b ? a % b : 0; }
FM_INLINE float fm_mod(float a, float b) { float r = c_fmod(a, b); return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE double fm_mod(double a, double b) { double r = c_fmod(a, b); return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE int64_t fm_mod(int64_t a, int64_t b) { int64_t r = b ? a % b : 0; return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE int64_t fm_floordiv(int64_t a, int64_t b) { int64_t q = b ? a / b : 0; return (b && a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q; }
// as Python: of the exact quotient, which a / b may have rounded up to the next whole number
template <class S> FM_INLINE S fm_floordiv(S a, S b) {
    if (b == 0) return a / b;
    const S rest = c_fmod(a, b);
    S whole = (a - rest) / b;
    if (rest != 0 && (b < 0) != (rest < 0)) whole -= 1;
    if (whole == 0) return (a / b) * 0;
    const S down = c_floor(whole);
    return whole - down > S(0.5) ? down + 1 : down;
}
// c ? a : b by masks, whatever the numbers are, NaN included
template <class S, class I> FM_INLINE S fm_masked(I m, S a, S b) {
    I x, y;
    __builtin_memcpy(&x, &a, sizeof a);
    __builtin_memcpy(&y, &b, sizeof b);
    x = (x & m) | (y & ~m);
    __builtin_memcpy(&a, &x, sizeof a);
    return a;
}
FM_INLINE float fm_pick(int c, float a, float b) { return fm_masked(-(int32_t)(c != 0), a, b); }
FM_INLINE double fm_pick(int c, double a, double b) { return fm_masked(-(int64_t)(c != 0), a, b); }
FM_INLINE double fm_exp(double x) { return c_exp(x); }
FM_INLINE double fm_log(double x) { return c_log(x); }
// log x = e ln 2 + log m, m in [sqrt 1/2, sqrt 2): Cephes' polynomial, which vectorises, within 2 units in the last place
FM_INLINE float fm_log(float x) {
    const int small = x < 1.17549435e-38f;
    const float y = small ? x * 8388608.0f : x;
    int32_t bits;
    __builtin_memcpy(&bits, &y, 4);
    const int32_t half = (bits & 0x7fffff) | 0x3f000000;
    float m;
    __builtin_memcpy(&m, &half, 4);
    float e = (float)((bits >> 23) - (small ? 149 : 126));
    const int low = m < 0.707106781f;
    e = low ? e - 1.0f : e;
    m = (low ? m + m : m) - 1.0f;
    const float s = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    float r = p * m * s - 2.12194440e-4f * e - 0.5f * s;
    r = (m + r) + 0.693359375f * e;
    r = x == INFINITY ? x : r;
    r = x == 0 ? -INFINITY : r;
    return x >= 0 ? r : NAN;
}
// 1 / sqrt x of a positive number that is not denormal, from a guess by its bits and Newton's steps, sooner than a root and
// a division: within 2 units in the last place
FM_INLINE float fm_rsqrt_normal(float x) {
    const float half = -0.5f * x;
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = 0x5f3759df - (bits >> 1);
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y = y * (1.5f + half * y * y);
    y = y * (1.5f + half * y * y);
    y = y + y * (0.5f + half * y * y);
    return x == INFINITY ? 0.0f : y;
}
FM_INLINE float fm_rsqrt(float x) {
    const int small = x < 1.17549435e-38f;
    float y = fm_rsqrt_normal(small ? x * 16777216.0f : x);
    y = small ? y * 4096.0f : y;
    y = x == 0 ? __builtin_copysignf(INFINITY, x) : y;
    return x >= 0 ? y : NAN;
}
FM_INLINE double fm_rsqrt_normal(double x) { return 1 / c_sqrt(x); }
FM_INLINE double fm_rsqrt(double x) { return 1 / c_sqrt(x); }
FM_INLINE double fm_tanh(double x) { return c_tanh(x); }
FM_INLINE double fm_erf(double x) { return c_erf(x); }
FM_INLINE double fm_pow(double a, double b) { return c_pow(a, b); }
FM_INLINE float fm_pow(float a, float b) { return c_pow(a, b); }
FM_INLINE int64_t fm_pow(int64_t a, int64_t b) { int64_t r = 1; for (; b > 0; b >>= 1, a *= a) if (b & 1) r *= a; return r; }
// e^x = 2^n e^r with |r| <= ln 2 / 2: a polynomial that vectorises, within 2 units in the last place. What is too large or
// too small becomes so by the two factors of 2^n, which are in two parts for results that are denormal
FM_INLINE float fm_exp(float x) {
    const float big = 89.0f, low = -104.0f, whole = 12582912.0f;  // numbers beside 1.5 * 2^23 have no fraction
    float y = x > big ? big : x;
    y = y < low ? low : y;
    const float q = y * 1.44269504088896341f + whole, n = q - whole;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t m;
    __builtin_memcpy(&m, &q, 4);
    m -= 0x4b400000;
    const int32_t half = m >> 1, one = (half + 127) << 23, other = (m - half + 127) << 23;
    float a, b;
    __builtin_memcpy(&a, &one, 4);
    __builtin_memcpy(&b, &other, 4);
    return p * a * b;
}
FM_INLINE float fm_sigmoid(float x) { return 1.0f / (1.0f + fm_exp(-x)); }
FM_INLINE double fm_sigmoid(double x) { return 1.0 / (1.0 + c_exp(-x)); }
FM_INLINE float fm_tanh(float x) {
    const float a = fm_abs(x), s = x * x;
    const float e = fm_exp(-2.0f * a), far = (1.0f - e) / (1.0f + e);
    const float near = a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
    const float t = a < 0.15f ? near : far;
    return __builtin_copysignf(t, x);
}
// a polynomial of x^2 near zero; else 1 - e^(-x^2) q(t), t = 1 / (1 + |x| / 2): fitted, relative error of q 3e-8
FM_INLINE float fm_erf(float x) {
    const float a = fm_abs(x), c = a > 4.0f ? 4.0f : a, s = c * c;
    const float near = 1.128379166e+00f + s * (-3.761262582e-01f + s * (1.128358515e-01f + s * (-2.685381193e-02f
        + s * (5.188327674e-03f + s * (-8.010193526e-04f + s * 7.853861028e-05f)))));
    const float t = 1.0f / (1.0f + 0.5f * c);
    const float far = 5.024657451e-04f + t * (2.749407146e-01f + t * (3.239105319e-01f + t * (1.204114352e-01f
        + t * (3.744330683e-01f + t * (-3.351772380e-02f + t * -6.149390463e-02f)))));
    const float tail = 1.0f - fm_exp(-s) * far;
    const float y = c < 1.0f ? c * near : tail;
    return x != x ? x : __builtin_copysignf(y, x);
}

// ---- products ----
// c[mc[i] + j] (+)= sum over o < ko and k < ki of a[ma[i] + ka[o] + k * as] * b[kb[o] + k * bs + j]
struct Terms {
    const int *ka, *kb;
    int ko, ki, as, bs;
};
void product(int m, int n, const float* a, const int* ma, const float* b, float* c, const int* mc, Terms k, bool add);
void product(int m, int n, const double* a, const int* ma, const double* b, double* c, const int* mc, Terms k, bool add);

// offsets of all points of a grid, row by row, from the sizes and steps of its sides; kept while the process lives
inline const int* fm_grid(int first, int dimensions, const int* sides) {
    int total = 1, count = 1;
    for (int d = 0; d < dimensions; d++) total *= sides[2 * d];
    int* out = (int*)malloc(sizeof(int) * (total + 1));
    out[0] = first;
    for (int d = 0; d < dimensions; d++) {
        const int size = sides[2 * d], step = sides[2 * d + 1];
        for (int i = count - 1; i >= 0; i--)
            for (int j = size - 1; j >= 0; j--) out[i * size + j] = out[i] + j * step;
        count *= size;
    }
    return out;
}

// ---- out[j * rs + i] = in[i * ld + j], a transposition of [m, n] ----
void transpose(int m, int n, const float* in, int ld, float* out, int rs);
void transpose(int m, int n, const double* in, int ld, double* out, int rs);
template <class S> inline void transpose(int m, int n, const S* in, int ld, S* out, int rs) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) out[j * rs + i] = in[i * ld + j];
}

// ---- memory of a thread, kept from call to call: what all tasks share, a task's own, a product's ----
inline char* fm_scratch(__SIZE_TYPE__ bytes, int which) {
    static thread_local struct Kept { char* p = nullptr; __SIZE_TYPE__ n = 0; ~Kept() { free(p); } } kept[3];
    Kept& k = kept[which];
    if (k.n < bytes) {
        free(k.p);
        k.p = (char*)aligned_alloc(64, (bytes + 63) / 64 * 64);
        k.n = k.p ? bytes : 0;
    }
    return k.p;
}

// ---- search ----
template <class S> inline int64_t fm_argmax(const S* p, int n, int64_t stride, int sign) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) {
        const S x = p[i * stride], y = p[best * stride];
        if ((sign > 0 ? x > y : x < y) || (x != x && y == y)) best = i;
    }
    return best;
}
template <class S>
inline int64_t fm_pool(const S* p, int top, int left, int kh, int kw, int dh, int dw, int h, int w, int64_t hs, int64_t ws) {
    int64_t best = -1;
    S most = 0;
    for (int i = 0; i < kh; i++)
        for (int j = 0; j < kw; j++) {
            const int y = top + i * dh, x = left + j * dw;
            if (y < 0 || x < 0 || y >= h || x >= w) continue;
            const S value = p[y * hs + x * ws];
            if (best < 0 || value > most || value != value) { best = (int64_t)y * w + x; most = value; }
        }
    return best;
}
FM_INLINE int64_t fm_index(int64_t i, int64_t n, bool wraps, int* bad) {
    if (wraps && i < 0) i += n;
    if (i < 0 || i >= n) { *bad |= 1; return 0; }
    return i;
}

// ---- sums over tasks: a part for each thread ----
template <class S> inline void fm_fill(char* p, int64_t n, S value) {
    for (int64_t i = 0; i < n; i++) ((S*)p)[i] = value;
}
template <class S, class F> inline void fm_total(S* out, int64_t n, const char* parts, int64_t apart, int used, F join) {
    for (int64_t i = 0; i < n; i++) out[i] = ((const S*)parts)[i];
    for (int k = 1; k < used; k++)
        for (int64_t i = 0; i < n; i++) out[i] = join(out[i], ((const S*)(parts + k * apart))[i]);
}
#ifdef _OPENMP
FM_INLINE int fm_threads() { return omp_get_num_threads(); }
FM_INLINE int fm_thread() { return omp_get_thread_num(); }
#else
FM_INLINE int fm_threads() { return 1; }
FM_INLINE int fm_thread() { return 0; }
#endif
