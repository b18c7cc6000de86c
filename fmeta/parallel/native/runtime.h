// Templates that generated kernels lean on: functions of one number, products, transposition, pooling.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
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
template <class S> FM_INLINE S fm_abs(S x) { return x < 0 ? -x : x; }
template <> FM_INLINE float fm_abs(float x) { return __builtin_fabsf(x); }
template <> FM_INLINE double fm_abs(double x) { return __builtin_fabs(x); }
template <class S> FM_INLINE S fm_max(S a, S b) { return (a > b || a != a) ? a : b; }
template <class S> FM_INLINE S fm_min(S a, S b) { return (a < b || a != a) ? a : b; }
template <class S> FM_INLINE S fm_sign(S x) { return S((x > 0) - (x < 0)); }
FM_INLINE float fm_mod(float a, float b) { float r = std::fmod(a, b); return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE double fm_mod(double a, double b) { double r = std::fmod(a, b); return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE int64_t fm_mod(int64_t a, int64_t b) { int64_t r = b ? a % b : 0; return (r != 0 && (r < 0) != (b < 0)) ? r + b : r; }
FM_INLINE int64_t fm_floordiv(int64_t a, int64_t b) { int64_t q = b ? a / b : 0; return (b && a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q; }
FM_INLINE float fm_floordiv(float a, float b) { return std::floor(a / b); }
FM_INLINE double fm_floordiv(double a, double b) { return std::floor(a / b); }
FM_INLINE double fm_exp(double x) { return std::exp(x); }
FM_INLINE double fm_log(double x) { return std::log(x); }
FM_INLINE float fm_log(float x) { return std::log(x); }
FM_INLINE double fm_tanh(double x) { return std::tanh(x); }
FM_INLINE double fm_erf(double x) { return std::erf(x); }
FM_INLINE float fm_erf(float x) { return std::erf(x); }
FM_INLINE double fm_pow(double a, double b) { return std::pow(a, b); }
FM_INLINE float fm_pow(float a, float b) { return std::pow(a, b); }
FM_INLINE int64_t fm_pow(int64_t a, int64_t b) { int64_t r = 1; for (; b > 0; b >>= 1, a *= a) if (b & 1) r *= a; return r; }
// e^x = 2^n e^r with |r| <= ln 2 / 2: a polynomial that vectorises, within 2 units in the last place
FM_INLINE float fm_exp(float x) {
    const float big = 88.7f, low = -103.9f;
    float y = x > big ? big : (x < low ? low : x);
    const float n = __builtin_floorf(y * 1.44269504088896341f + 0.5f);
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t m = (int32_t)n, half = m >> 1, rest = m - half;  // in two parts, for results that are denormal
    const int32_t one = (half + 127) << 23, other = (rest + 127) << 23;
    float a, b;
    std::memcpy(&a, &one, 4);
    std::memcpy(&b, &other, 4);
    p = p * a * b;
    p = x > big + 0.03f ? INFINITY : p;
    return x != x ? x : (x < low ? 0.0f : p);
}
FM_INLINE float fm_sigmoid(float x) { return 1.0f / (1.0f + fm_exp(-x)); }
FM_INLINE double fm_sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
FM_INLINE float fm_tanh(float x) {
    const float a = fm_abs(x), s = x * x;
    const float e = fm_exp(-2.0f * a), far = (1.0f - e) / (1.0f + e);
    const float near = a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
    const float t = a < 0.15f ? near : far;
    return x < 0 ? -t : t;
}

// ---- vectors ----
template <class S> struct Lanes;
template <> struct Lanes<float> { typedef float V __attribute__((vector_size(FM_BYTES))); static constexpr int n = FM_BYTES / 4; };
template <> struct Lanes<double> { typedef double V __attribute__((vector_size(FM_BYTES))); static constexpr int n = FM_BYTES / 8; };
template <class S> using Vec = typename Lanes<S>::V;

// the first R lanes; R = 0 is all of them
template <class S, int R> FM_INLINE Vec<S> load(const S* p) {
    Vec<S> v{};
    if constexpr (R == 0) { std::memcpy(&v, p, sizeof(v)); }
    else {
#if FM_BYTES == 32
        alignas(32) static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
        const __m256i m = _mm256_loadu_si256((const __m256i*)(mask + 8 - R * (int)(sizeof(S) / 4)));
        __m256 w = _mm256_maskload_ps((const float*)p, m);
        std::memcpy(&v, &w, sizeof(v));
#else
        for (int i = 0; i < R; i++) v[i] = p[i];
#endif
    }
    return v;
}
template <class S, int R> FM_INLINE void store(S* p, Vec<S> v) {
    if constexpr (R == 0) { std::memcpy(p, &v, sizeof(v)); }
    else { for (int i = 0; i < R; i++) p[i] = v[i]; }
}

// ---- products ----
// c[mc[i] + j] (+)= sum over o < KO and k < KI of a[ma[i] + ka[o] + k * AS] * b[kb[o] + k * BS + j]
template <class S, int MR, int NV, int R, int KI, int AS, int BS>
FM_INLINE void micro(const S* a, const int* ma, const S* b, S* c, const int* mc, const int* ka, const int* kb, int KO, bool add) {
    constexpr int V = Lanes<S>::n;
    Vec<S> sum[MR][NV];
    const S* row[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        row[i] = a + ma[i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) sum[i][j] = Vec<S>{};
    }
    for (int o = 0; o < KO; o++) {
        const int at = ka[o];
        const S* q = b + kb[o];
        for (int k = 0; k < KI; k++) {
            Vec<S> w[NV];
#pragma GCC unroll 16
            for (int j = 0; j < NV; j++) w[j] = j == NV - 1 ? load<S, R>(q + j * V) : load<S, 0>(q + j * V);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) {
                const S x = row[i][at + k * AS];
#pragma GCC unroll 16
                for (int j = 0; j < NV; j++) sum[i][j] += x * w[j];
            }
            q += BS;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        S* out = c + mc[i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) {
            if (j == NV - 1) { store<S, R>(out + j * V, add ? sum[i][j] + load<S, R>(out + j * V) : sum[i][j]); }
            else { store<S, 0>(out + j * V, add ? sum[i][j] + load<S, 0>(out + j * V) : sum[i][j]); }
        }
    }
}
template <class S, int MR, int NV, int R, int KI, int AS, int BS>
inline void panel(int m, const S* a, const int* ma, const S* b, S* c, const int* mc, const int* ka, const int* kb, int KO, bool add) {
    int i = 0;
    for (; i + MR <= m; i += MR) micro<S, MR, NV, R, KI, AS, BS>(a, ma + i, b, c, mc + i, ka, kb, KO, add);
    constexpr int HALF = MR > 4 ? 4 : MR / 2;
    if constexpr (HALF > 0) if (i < m) panel<S, HALF, NV, R, KI, AS, BS>(m - i, a, ma + i, b, c, mc + i, ka, kb, KO, add);
}
template <class S, int N, int KI, int AS, int BS>
inline void product(int m, const S* a, const int* ma, const S* b, S* c, const int* mc, const int* ka, const int* kb, int KO, bool add) {
    constexpr int V = Lanes<S>::n, ALL = (N + V - 1) / V, R = N % V, REGISTERS = FM_BYTES == 64 ? 28 : 12;
    constexpr int NV = ALL <= 3 ? ALL : (ALL % 3 == 0 || ALL % 3 == 2 ? 3 : 2);
    constexpr int LEFT = (R == 0) ? ALL % NV : ALL - ((ALL - 1) / NV) * NV;
    constexpr int MR = REGISTERS / NV > 8 ? 8 : REGISTERS / NV;
    constexpr int BLOCK = KI * NV * FM_BYTES > 16384 ? 1 : 16384 / (KI * NV * FM_BYTES);  // of b, for the first cache
    for (int o = 0; o < KO; o += BLOCK) {
        const int n = KO - o < BLOCK ? KO - o : BLOCK;
        const bool more = add || o > 0;
        int j = 0;
        for (; j + NV < ALL || (j + NV == ALL && R == 0); j += NV)
            panel<S, MR, NV, 0, KI, AS, BS>(m, a, ma, b + j * V, c + j * V, mc, ka + o, kb + o, n, more);
        if constexpr (LEFT > 0) {
            constexpr int MR2 = REGISTERS / LEFT > 8 ? 8 : REGISTERS / LEFT;
            panel<S, MR2, LEFT, R, KI, AS, BS>(m, a, ma, b + j * V, c + j * V, mc, ka + o, kb + o, n, more);
        }
    }
}

// ---- out[j * RS + i] = in[i * LD + j], a transposition of [M, N] ----
template <class S, int M, int N, int LD, int RS> inline void transpose(const S* in, S* out) {
    constexpr int B = 8;
    for (int i = 0; i < M; i += B)
        for (int j = 0; j < N; j += B) {
            const int im = M - i < B ? M - i : B, jm = N - j < B ? N - j : B;
#if FM_BYTES >= 32
            if constexpr (sizeof(S) == 4) {
                if (im == B && jm == B) {
                    const float* p = (const float*)in + i * LD + j;
                    float* q = (float*)out + j * RS + i;
                    __m256 r0 = _mm256_loadu_ps(p), r1 = _mm256_loadu_ps(p + LD), r2 = _mm256_loadu_ps(p + 2 * LD), r3 = _mm256_loadu_ps(p + 3 * LD);
                    __m256 r4 = _mm256_loadu_ps(p + 4 * LD), r5 = _mm256_loadu_ps(p + 5 * LD), r6 = _mm256_loadu_ps(p + 6 * LD), r7 = _mm256_loadu_ps(p + 7 * LD);
                    __m256 a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1), a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
                    __m256 a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5), a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
                    r0 = _mm256_shuffle_ps(a0, a2, 0x44); r1 = _mm256_shuffle_ps(a0, a2, 0xEE); r2 = _mm256_shuffle_ps(a1, a3, 0x44); r3 = _mm256_shuffle_ps(a1, a3, 0xEE);
                    r4 = _mm256_shuffle_ps(a4, a6, 0x44); r5 = _mm256_shuffle_ps(a4, a6, 0xEE); r6 = _mm256_shuffle_ps(a5, a7, 0x44); r7 = _mm256_shuffle_ps(a5, a7, 0xEE);
                    _mm256_storeu_ps(q, _mm256_permute2f128_ps(r0, r4, 0x20)); _mm256_storeu_ps(q + RS, _mm256_permute2f128_ps(r1, r5, 0x20));
                    _mm256_storeu_ps(q + 2 * RS, _mm256_permute2f128_ps(r2, r6, 0x20)); _mm256_storeu_ps(q + 3 * RS, _mm256_permute2f128_ps(r3, r7, 0x20));
                    _mm256_storeu_ps(q + 4 * RS, _mm256_permute2f128_ps(r0, r4, 0x31)); _mm256_storeu_ps(q + 5 * RS, _mm256_permute2f128_ps(r1, r5, 0x31));
                    _mm256_storeu_ps(q + 6 * RS, _mm256_permute2f128_ps(r2, r6, 0x31)); _mm256_storeu_ps(q + 7 * RS, _mm256_permute2f128_ps(r3, r7, 0x31));
                    continue;
                }
            }
#endif
            for (int l = 0; l < jm; l++)
                for (int k = 0; k < im; k++) out[(j + l) * RS + i + k] = in[(i + k) * LD + j + l];
        }
}

// ---- memory of a thread, kept from call to call ----
inline char* fm_scratch(size_t bytes, int which) {
    static thread_local struct Kept { char* p = nullptr; size_t n = 0; ~Kept() { std::free(p); } } kept[2];
    Kept& k = kept[which];
    if (k.n < bytes) {
        std::free(k.p);
        k.p = (char*)std::aligned_alloc(64, (bytes + 63) / 64 * 64);
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
    if (i < 0 || i >= n) { *bad = 1; return 0; }
    return i;
}
