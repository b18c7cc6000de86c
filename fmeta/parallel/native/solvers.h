// Factors and systems of small matrices, each row by row, z of them one after the other; and rows in order or summed up.
#pragma once
#include "runtime.h"

// out[i] -= factor * row[i]
template <class S> FM_INLINE void fm_less(int m, S factor, const S* __restrict row, S* __restrict out) {
    for (int i = 0; i < m; i++) out[i] -= factor * row[i];
}

template <class S> FM_INLINE void fm_swap(int m, S* a, S* b) {
    if (a == b) return;
    for (int i = 0; i < m; i++) { const S x = a[i]; a[i] = b[i]; b[i] = x; }
}

template <class S> FM_INLINE void fm_same(int64_t n, const S* a, S* out) {
    for (int64_t i = 0; i < n; i++) out[i] = a[i];
}

// L (below the diagonal, whose ones are left out) and U of rows that are exchanged as `pivots` tell, counted from 1
template <class S> void fm_lu(int z, int n, const S* a, S* lu, int32_t* pivots) {
    fm_same((int64_t)z * n * n, a, lu);
    for (; z--; lu += n * n, pivots += n)
        for (int k = 0; k < n; k++) {
            int at = k;
            for (int i = k + 1; i < n; i++)
                if (fm_abs(lu[i * n + k]) > fm_abs(lu[at * n + k])) at = i;
            pivots[k] = at + 1;
            fm_swap(n, lu + k * n, lu + at * n);
            const S* const top = lu + k * n + k;
            for (int i = k + 1; i < n; i++) {
                S* const row = lu + i * n + k;
                row[0] /= top[0];
                fm_less(n - k - 1, row[0], top + 1, row + 1);
            }
        }
}

// Rows of x from the first to the last, or back, each less the ones solved before it: a[i, k] with `across`, else a[k, i]
template <class S> FM_INLINE void fm_substitute(int n, int m, const S* a, S* x, bool down, bool across, bool unit) {
    for (int step = 0; step < n; step++) {
        const int i = down ? step : n - 1 - step;
        S* const row = x + (int64_t)i * m;
        for (int done = 0; done < step; done++) {
            const int k = down ? done : n - 1 - done;
            fm_less(m, across ? a[i * n + k] : a[k * n + i], x + (int64_t)k * m, row);
        }
        if (!unit)
            for (int j = 0; j < m; j++) row[j] /= a[i * n + i];
    }
}

template <class S> void fm_triangular(int z, int n, int m, const S* a, const S* b, S* x, bool upper, bool unit) {
    fm_same((int64_t)z * n * m, b, x);
    for (; z--; a += n * n, x += (int64_t)n * m) fm_substitute(n, m, a, x, !upper, true, unit);
}

// The system of what was factored, or of its transposed
template <class S>
void fm_lu_solve(int z, int n, int m, const S* lu, const int32_t* pivots, const S* b, S* x, bool transposed) {
    fm_same((int64_t)z * n * m, b, x);
    for (; z--; lu += n * n, pivots += n, x += (int64_t)n * m) {
        const auto exchange = [&](int i) { fm_swap(m, x + (int64_t)i * m, x + (int64_t)(pivots[i] - 1) * m); };
        if (!transposed)
            for (int i = 0; i < n; i++) exchange(i);
        fm_substitute(n, m, lu, x, true, !transposed, !transposed);
        fm_substitute(n, m, lu, x, false, !transposed, transposed);
        if (transposed)
            for (int i = n; i--;) exchange(i);
    }
}

// From the lower half of a; NaN where it is not positive definite
template <class S> void fm_cholesky(int z, int n, const S* a, S* l) {
    for (; z--; a += n * n, l += n * n)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++) {
                S left = j <= i ? a[i * n + j] : S(0);
                for (int k = 0; k < j && j <= i; k++) left -= l[i * n + k] * l[j * n + k];
                l[i * n + j] = j < i ? left / l[j * n + j] : j == i ? c_sqrt(left) : S(0);
            }
}

// sums, or products, of all numbers so far
template <class S> void fm_so_far(int z, int n, const S* a, S* out, bool product) {
    for (; z--; a += n, out += n) {
        S all = product ? 1 : 0;
        for (int i = 0; i < n; i++) out[i] = all = product ? all * a[i] : all + a[i];
    }
}

// z rows of n numbers in order, NaN as the greatest, and where they were; equal ones as they stood
template <class S> void fm_sort(int z, int n, const S* a, S* out, int64_t* at, bool falling) {
    const auto before = [=](S x, S y) { return falling ? x > y || (x != x && y == y) : x < y || (y != y && x == x); };
    for (; z--; a += n, out += n, at += n)
        for (int i = 0; i < n; i++) {
            int to = i;
            for (; to && before(a[i], out[to - 1]); to--) { out[to] = out[to - 1]; at[to] = at[to - 1]; }
            out[to] = a[i];
            at[to] = i;
        }
}
