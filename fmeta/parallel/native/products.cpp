// Products of matrices by blocks that fit the registers, and transpositions. Compiled once for a machine, linked into
// every kernel.
#include "runtime.h"
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// ---- vectors ----
template <class S> struct Lanes;
template <> struct Lanes<float> { typedef float V __attribute__((vector_size(FM_BYTES))); static constexpr int n = FM_BYTES / 4; };
template <> struct Lanes<double> { typedef double V __attribute__((vector_size(FM_BYTES))); static constexpr int n = FM_BYTES / 8; };
template <class S> using Vec = typename Lanes<S>::V;

// Some first lanes, or all. Lane by lane, a row that ends inside a vector costs more than all the rest.
template <class S> struct Tail {
    int count;
    FM_INLINE Vec<S> load(const S* p) const {
        Vec<S> v{};
#if FM_BYTES == 64
        if constexpr (sizeof(S) == 4) v = (Vec<S>)_mm512_maskz_loadu_ps(mask(), p);
        else v = (Vec<S>)_mm512_maskz_loadu_pd(mask(), p);
#elif FM_BYTES == 32
        const __m256 w = _mm256_maskload_ps((const float*)p, mask());
        std::memcpy(&v, &w, sizeof(v));
#else
        for (int i = 0; i < Lanes<S>::n; i++) v[i] = i < count ? p[i] : 0;
#endif
        return v;
    }
    FM_INLINE void store(S* p, Vec<S> v) const {
#if FM_BYTES == 64
        if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, mask(), (__m512)v);
        else _mm512_mask_storeu_pd(p, mask(), (__m512d)v);
#elif FM_BYTES == 32
        __m256 w;
        std::memcpy(&w, &v, sizeof(v));
        _mm256_maskstore_ps((float*)p, mask(), w);
#else
        for (int i = 0; i < count; i++) p[i] = v[i];
#endif
    }
#if FM_BYTES == 64
    FM_INLINE unsigned mask() const { return (1u << count) - 1; }
#elif FM_BYTES == 32
    FM_INLINE __m256i mask() const {
        alignas(32) static const int32_t bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
        return _mm256_loadu_si256((const __m256i*)(bits + 8 - count * (int)(sizeof(S) / 4)));
    }
#endif
};

template <class S> FM_INLINE Vec<S> whole(const S* p) {
    Vec<S> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

// A block of MR rows and NV vectors of the result. PACKED: the right matrix is laid out for it, term by term.
template <class S, int MR, int NV, bool TAIL, bool PACKED>
static void micro(const S* a, const int* ma, const S* b, S* c, const int* mc, const Terms& t, int from, int to, bool add, Tail<S> tail) {
    constexpr int V = Lanes<S>::n;
    Vec<S> sum[MR][NV];
    const S* row[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        row[i] = a + ma[i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) sum[i][j] = Vec<S>{};
    }
    const S* q = b;
    for (int o = from; o < to; o++) {
        long at = t.ka[o];
        if (!PACKED) q = b + t.kb[o];
        for (int k = 0; k < t.ki; k++) {
            Vec<S> w[NV];
#pragma GCC unroll 16
            for (int j = 0; j < NV; j++) w[j] = TAIL && !PACKED && j == NV - 1 ? tail.load(q + j * V) : whole(q + j * V);
#pragma GCC unroll 16
            for (int i = 0; i < MR; i++) {
                const S x = row[i][at];
#pragma GCC unroll 16
                for (int j = 0; j < NV; j++) sum[i][j] += x * w[j];
            }
            q += PACKED ? NV * V : t.bs;
            at += t.as;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        S* out = c + mc[i];
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) {
            S* p = out + j * V;
            if (TAIL && j == NV - 1) tail.store(p, add ? sum[i][j] + tail.load(p) : sum[i][j]);
            else {
                const Vec<S> v = add ? sum[i][j] + whole(p) : sum[i][j];
                std::memcpy(p, &v, sizeof(v));
            }
        }
    }
}

template <class S, int MR, int NV, bool TAIL, bool PACKED>
static void panel(int m, const S* a, const int* ma, const S* b, S* c, const int* mc, const Terms& t, int from, int to, bool add, Tail<S> tail) {
    int i = 0;
    for (; i + MR <= m; i += MR) micro<S, MR, NV, TAIL, PACKED>(a, ma + i, b, c, mc + i, t, from, to, add, tail);
    constexpr int LESS = MR > 4 ? 4 : MR / 2;
    if constexpr (LESS > 0)
        if (i < m) panel<S, LESS, NV, TAIL, PACKED>(m - i, a, ma + i, b, c, mc + i, t, from, to, add, tail);
}

// Some terms of the right matrix, `n` of its columns, one vector or two at a time; what is beyond is zero.
template <class S> static void pack(int n, const S* b, const Terms& t, int from, int to, S* out) {
    constexpr int V = Lanes<S>::n;
    for (int j = 0; j < n; j += 2 * V) {
        const int width = n - j > V ? 2 * V : V, some = n - j < width ? n - j : width;
        for (int o = from; o < to; o++) {
            const S* q = b + t.kb[o] + j;
            for (int k = 0; k < t.ki; k++, q += t.bs, out += width) {
                if (some == 2 * V) std::memcpy(out, q, 2 * V * sizeof(S));
                else
                    for (int l = 0; l < width; l++) out[l] = l < some ? q[l] : 0;
            }
        }
    }
}

// All rows and columns, for some terms.
template <class S, bool PACKED>
static void rows(int m, int n, const S* a, const int* ma, const S* b, S* c, const int* mc, const Terms& t, int from, int to, bool add) {
    constexpr int V = Lanes<S>::n, REGISTERS = FM_BYTES == 64 ? 28 : 12;
    constexpr int M1 = 8, M2 = REGISTERS / 2 > 8 ? 8 : REGISTERS / 2;  // three vectors leave no register free
    const Tail<S> tail{n % V};
    const int terms = (to - from) * t.ki;
    for (int j = 0; j < n; j += 2 * V) {
        const bool two = n - j > V, last = n - j < (two ? 2 * V : V);
        const S* q = PACKED ? b + (long)j * terms : b + j;
        S* p = c + j;
        if (two) last ? panel<S, M2, 2, true, PACKED>(m, a, ma, q, p, mc, t, from, to, add, tail) : panel<S, M2, 2, false, PACKED>(m, a, ma, q, p, mc, t, from, to, add, tail);
        else last ? panel<S, M1, 1, true, PACKED>(m, a, ma, q, p, mc, t, from, to, add, tail) : panel<S, M1, 1, false, PACKED>(m, a, ma, q, p, mc, t, from, to, add, tail);
    }
}

// Terms in pieces whose part of the right matrix, laid out by two vectors, stays in the first cache; rows in pieces whose
// part of the left one stays in the second. Few rows, or a small right matrix, are not worth the layout.
template <class S>
static void blocks(int m, int n, const S* a, const int* ma, const S* b, S* c, const int* mc, Terms t, bool add) {
    constexpr int TERMS = 12288 / (2 * FM_BYTES), COLUMNS = 128, FEW = 24, LEFT = 65536 / sizeof(S);
    const int inner = t.ki;
    const bool near = (long)t.ko * inner * n * sizeof(S) <= 12288;  // in the first cache as it is
    S* const room = m < FEW || near ? nullptr : (S*)fm_scratch(TERMS * COLUMNS * sizeof(S), 2);
    for (int k = 0; k < inner; k += TERMS) {  // long runs of terms are cut
        t.ki = inner - k < TERMS ? inner - k : TERMS;
        const S *left = a + (long)k * t.as, *right = b + (long)k * t.bs;
        const int runs = TERMS / t.ki, pieces = (t.ko + runs - 1) / runs, block = (t.ko + pieces - 1) / pieces;
        for (int o = 0; o < t.ko; o += block) {
            const int to = o + block < t.ko ? o + block : t.ko;
            const bool more = add || o > 0 || k > 0;
            if (!room) {
                rows<S, false>(m, n, left, ma, right, c, mc, t, o, to, more);
                continue;
            }
            const int fit = LEFT / ((to - o) * t.ki) / 12 * 12, tall = fit < 48 ? 48 : fit;
            for (int j = 0; j < n; j += COLUMNS) {
                const int wide = n - j < COLUMNS ? n - j : COLUMNS;
                pack(wide, right + j, t, o, to, room);
                for (int i = 0; i < m; i += tall)
                    rows<S, true>(m - i < tall ? m - i : tall, wide, left, ma + i, room, c + j, mc + i, t, o, to, more);
            }
        }
    }
}

template <class S> static void turn(int M, int N, const S* in, int LD, S* out, int RS) {
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

#if !defined(FM_DOUBLE)
void product(int m, int n, const float* a, const int* ma, const float* b, float* c, const int* mc, Terms k, bool add) {
    blocks(m, n, a, ma, b, c, mc, k, add);
}
void transpose(int m, int n, const float* in, int ld, float* out, int rs) { turn(m, n, in, ld, out, rs); }
#else
void product(int m, int n, const double* a, const int* ma, const double* b, double* c, const int* mc, Terms k, bool add) {
    blocks(m, n, a, ma, b, c, mc, k, add);
}
void transpose(int m, int n, const double* in, int ld, double* out, int rs) { turn(m, n, in, ld, out, rs); }
#endif
