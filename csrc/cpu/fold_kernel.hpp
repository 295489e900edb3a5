// m gradients of a run of elements from what groups of sequences give, and their inner products
// while they are in the cache. Included once per target, inside its namespace, after
// gram_kernel.hpp, in whose blocks and order the products are summed.

// Σ_g U_g t_g of R rows of U, each sum in the order of the groups; `add`: and what `to` holds.
template <class T, int R>
static void fold_rows(const T* t, std::int64_t pitch, int groups, const T* U, std::int64_t n,
                      T* const* to, bool add) {
  using V = typename Vector<T>::type;
  constexpr int W = static_cast<int>(sizeof(V) / sizeof(T));
  constexpr int vectors = W >= 8 ? 1 : kLanes / W;
  constexpr int step = vectors * W;
  std::int64_t k = 0;
  for (; k + step <= n; k += step) {
    V sum[R][vectors] = {};
    for (int g = 0; g < groups; ++g) {
      V x[vectors];
      std::memcpy(x, t + g * pitch + k, sizeof x);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int part = 0; part < vectors; ++part) sum[i][part] += U[i * groups + g] * x[part];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      if (add) {
        V before[vectors];
        std::memcpy(before, to[i] + k, sizeof before);
#pragma GCC unroll 8
        for (int part = 0; part < vectors; ++part) sum[i][part] += before[part];
      }
      std::memcpy(to[i] + k, sum[i], sizeof sum[i]);
    }
  }
  for (; k < n; ++k) {
    for (int i = 0; i < R; ++i) {
      T sum = T(0);
      for (int g = 0; g < groups; ++g) sum += U[i * groups + g] * t[g * pitch + k];
      to[i][k] = add ? sum + to[i][k] : sum;
    }
  }
}

// S: of the gradients as stored, T: of the arithmetic.
template <class S, class T>
static void fold_of(const Fold& fold, std::int64_t n, double* sums) {
  constexpr bool in_place = std::is_same<S, T>::value;
  alignas(64) T block[in_place ? 1 : kMaxLists][in_place ? 1 : kBlock];
  const T* const U = static_cast<const T*>(fold.U);
  const std::int64_t most = in_place ? kBlock * at_once(fold.m) : kBlock;
  for (std::int64_t start = 0, size; start < n; start += size) {
    size = n - start < most ? std::int64_t{kBlock} : most;
    if (n - start < size) size = n - start;
    T* rows[kMaxLists];
    for (int i = 0; i < fold.m; ++i) {
      S* const to = static_cast<S*>(fold.out[i]) + start;
      if constexpr (in_place) {
        rows[i] = to;
      } else {
        rows[i] = block[i];
        if (!fold.fresh)
          for (std::int64_t k = 0; k < size; ++k) widen(to[k], block[i][k]);
      }
    }
    const T* const t = static_cast<const T*>(fold.t) + start;
    for (int i = 0; i < fold.m; i += 4) {
      const T* const of_rows = U + i * fold.groups;
      switch (fold.m - i) {
        case 1: fold_rows<T, 1>(t, fold.pitch, fold.groups, of_rows, size, rows + i, !fold.fresh); break;
        case 2: fold_rows<T, 2>(t, fold.pitch, fold.groups, of_rows, size, rows + i, !fold.fresh); break;
        case 3: fold_rows<T, 3>(t, fold.pitch, fold.groups, of_rows, size, rows + i, !fold.fresh); break;
        default: fold_rows<T, 4>(t, fold.pitch, fold.groups, of_rows, size, rows + i, !fold.fresh);
      }
    }
    if constexpr (!in_place) {
      for (int i = 0; i < fold.m; ++i) {
        S* const to = static_cast<S*>(fold.out[i]) + start;
        for (std::int64_t k = 0; k < size; ++k) narrow(block[i][k], to[k]);
        for (std::int64_t k = 0; k < size; ++k) widen(to[k], block[i][k]);  // as it was rounded
      }
    }
    if (sums != nullptr) block_products<T>(rows, fold.m, size, kEvery, fold.m, sums);
  }
}

static void fold(const Fold& fold, std::int64_t n, double* sums) {
  switch (fold.dtype) {
    case Dtype::float32: return fold_of<float, float>(fold, n, sums);
    case Dtype::bfloat16: return fold_of<bfloat16, float>(fold, n, sums);
    case Dtype::float16: return fold_of<float16, float>(fold, n, sums);
    case Dtype::float64: return fold_of<double, double>(fold, n, sums);
  }
}
