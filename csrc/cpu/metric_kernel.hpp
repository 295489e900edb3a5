// The dot products of m gradients g_i, and those of s g_i with s = sqrt(factor / (sqrt(v) root + eps)),
// over one run of elements. Included once per target, inside its namespace, after gram_kernel.hpp
// and update_kernel.hpp.
//
// A block of every gradient is in the cache when it is multiplied by s, so gradients and v are read
// from memory once. Elements with v = 0 have no part in the second matrix, whatever eps is.

template <class T>
static void scales(const T* __restrict v, std::int64_t n, const Moment& moment, T* __restrict s) {
  const T root = static_cast<T>(moment.root), eps = static_cast<T>(moment.eps);
  const T factor = static_cast<T>(moment.factor);
  for (std::int64_t k = 0; k < n; ++k) {
    const T found = square_root(factor / (square_root(v[k]) * root + eps));
    s[k] = v[k] == T(0) ? T(0) : found;
  }
}

// S: as stored, T: of the products.
template <class S, class T>
static void gram_in_metric_of(const Present& grads, const Moment& moment, int m, std::int64_t n,
                              double* sums) {
  constexpr bool in_place = std::is_same<S, T>::value;
  alignas(64) T block[kMaxLists][kBlock], v_buffer[kBlock], s[kBlock];
  const T* rows[kMaxLists];
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t size = n - start < kBlock ? n - start : kBlock;
    for (int i = 0; i < grads.count; ++i) {
      const S* from = static_cast<const S*>(grads.data[i]) + start;
      if constexpr (in_place) {
        rows[i] = from;
      } else {
        for (std::int64_t k = 0; k < size; ++k) widen(from[k], block[i][k]);
        rows[i] = block[i];
      }
    }
    block_products<T>(rows, grads.count, size, grads.index, m, sums);
    if (moment.second.data == nullptr) continue;
    scales<T>(opened(moment.second, start, size, v_buffer), size, moment, s);
    for (int i = 0; i < grads.count; ++i) {
      for (std::int64_t k = 0; k < size; ++k) block[i][k] = rows[i][k] * s[k];
      rows[i] = block[i];
    }
    block_products<T>(rows, grads.count, size, grads.index, m, sums + m * m * kLanes);
  }
}

static void gram_in_metric(const Present& grads, const Moment& moment, int m, std::int64_t n,
                           double* sums) {
  switch (grads.dtype) {
    case Dtype::float32: return gram_in_metric_of<float, float>(grads, moment, m, n, sums);
    case Dtype::bfloat16: return gram_in_metric_of<bfloat16, float>(grads, moment, m, n, sums);
    case Dtype::float16: return gram_in_metric_of<float16, float>(grads, moment, m, n, sums);
    case Dtype::float64: return gram_in_metric_of<double, double>(grads, moment, m, n, sums);
  }
}
