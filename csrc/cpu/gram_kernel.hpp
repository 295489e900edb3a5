// The dot products of m gradients over one run of elements. Included once per target, inside its
// namespace, after RACO_VECTOR_BYTES is defined (0: no vector types in this compiler).
//
// A block of kBlock elements of every gradient is brought into the cache (halves are widened on
// the way, float32 and float64 are read where they lie), and all pairs are formed from it by tiles
// of at most 4 x 4 pairs whose sums stay in registers: the triangle of 4 gradients needs 10
// accumulators and 4 operands, the 4 x 2 rectangle 8 and 6, so both fit 16 registers. Each pair
// has kLanes sums; lane l adds elements l, l + kLanes, ... in that order on every target. Up to 3
// gradients leave registers, and an addition waits for the one before it, so then several blocks
// are summed at the same time, each by itself: the bits are those of one after the other.

template <class T>
struct Vector {
  using type = T;
  using wide = double;
};
#if RACO_VECTOR_BYTES > 0
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(RACO_VECTOR_BYTES)));
  typedef double wide __attribute__((vector_size(2 * RACO_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(RACO_VECTOR_BYTES)));
  typedef double wide __attribute__((vector_size(RACO_VECTOR_BYTES)));
};
#endif

// sums[0..W) += the W lanes of a vector, in float64.
template <class V, class W>
static void add_lanes(const V& lanes, double* sums) {
  W sum;
  std::memcpy(&sum, sums, sizeof sum);
#if RACO_VECTOR_BYTES > 0
  sum += __builtin_convertvector(lanes, W);
#else
  sum += static_cast<W>(lanes);
#endif
  std::memcpy(sums, &sum, sizeof sum);
}

// Rows a[0..R) against columns b[0..C); C = 0: the rows against themselves, i <= j. B blocks of n
// elements, kBlock apart.
template <class T, int R, int C, int B = 1>
static void tile(const T* const* a, const T* const* b, std::int64_t n, const int* row,
                 const int* column, int m, double* sums) {
  using V = typename Vector<T>::type;
  using Wide = typename Vector<T>::wide;
  constexpr int W = static_cast<int>(sizeof(V) / sizeof(T)), parts = kLanes / W;
  constexpr bool triangle = C == 0;
  constexpr int columns = triangle ? R : C;
  V total[B][R][columns][parts] = {};
  for (std::int64_t k = 0; k < n; k += kLanes) {
#pragma GCC unroll 4
    for (int block = 0; block < B; ++block) {
#pragma GCC unroll 8
      for (int part = 0; part < parts; ++part) {
        const std::int64_t at = block * kBlock + k + part * W;
        V x[R], y[columns];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) std::memcpy(&x[i], a[i] + at, sizeof(V));
        if (!triangle) {
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j) std::memcpy(&y[j], b[j] + at, sizeof(V));
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
          for (int j = triangle ? i : 0; j < columns; ++j)
            total[block][i][j][part] += x[i] * (triangle ? x[j] : y[j]);
        }
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = triangle ? i : 0; j < columns; ++j) {
      double* const sum = sums + (row[i] * m + column[j]) * kLanes;
      for (int block = 0; block < B; ++block)
        for (int part = 0; part < parts; ++part)
          add_lanes<V, Wide>(total[block][i][j][part], sum + part * W);
    }
  }
}

// How many blocks of so many gradients are summed at the same time.
constexpr int at_once(int count) { return count <= 2 ? 4 : count == 3 ? 2 : 1; }

// All pairs of `count` rows of n elements, n a multiple of kLanes, or at_once(count) whole blocks.
template <class T>
static void all_pairs(const T* const* rows, int count, std::int64_t n, const int* index, int m,
                      double* sums) {
  if (n > kBlock) {
    switch (count) {
      case 1: return tile<T, 1, 0, at_once(1)>(rows, rows, kBlock, index, index, m, sums);
      case 2: return tile<T, 2, 0, at_once(2)>(rows, rows, kBlock, index, index, m, sums);
      default: return tile<T, 3, 0, at_once(3)>(rows, rows, kBlock, index, index, m, sums);
    }
  }
  for (int i = 0; i < count; i += 4) {
    const T* const* a = rows + i;
    const int* r = index + i;
    switch (count - i) {
      case 1: tile<T, 1, 0>(a, a, n, r, r, m, sums); break;
      case 2: tile<T, 2, 0>(a, a, n, r, r, m, sums); break;
      case 3: tile<T, 3, 0>(a, a, n, r, r, m, sums); break;
      default: tile<T, 4, 0>(a, a, n, r, r, m, sums);
    }
    int j = i + 4;
    for (; j + 2 <= count; j += 2) tile<T, 4, 2>(a, rows + j, n, r, index + j, m, sums);
    if (j < count) tile<T, 4, 1>(a, rows + j, n, r, index + j, m, sums);
  }
}

// Adds the products of `count` rows of n elements, at most at_once(count) blocks.
template <class T>
static void block_products(const T* const* rows, int count, std::int64_t n, const int* index,
                           int m, double* sums) {
  const std::int64_t whole = n - n % kLanes;
  all_pairs(rows, count, whole, index, m, sums);
  if (whole == n) return;
  alignas(64) T tail[kMaxLists][kLanes];
  const T* ends[kMaxLists];
  for (int i = 0; i < count; ++i) {
    for (int l = 0; l < kLanes; ++l) tail[i][l] = whole + l < n ? rows[i][whole + l] : T(0);
    ends[i] = tail[i];
  }
  all_pairs(ends, count, kLanes, index, m, sums);
}

// S: as stored, T: of the products.
template <class S, class T>
static void gram_of(const Present& grads, int m, std::int64_t n, double* sums) {
  constexpr bool in_place = std::is_same<S, T>::value;
  alignas(64) T block[in_place ? 1 : kMaxLists][in_place ? 1 : kBlock];
  const T* rows[kMaxLists];
  const std::int64_t most = in_place ? kBlock * at_once(grads.count) : kBlock;
  for (std::int64_t start = 0, size; start < n; start += size) {
    size = n - start < most ? std::int64_t{kBlock} : most;
    if (n - start < size) size = n - start;
    for (int i = 0; i < grads.count; ++i) {
      const S* from = static_cast<const S*>(grads.data[i]) + start;
      if constexpr (in_place) {
        rows[i] = from;
      } else {
        T* to = block[i];
        for (std::int64_t k = 0; k < size; ++k) widen(from[k], to[k]);
        rows[i] = to;
      }
    }
    block_products<T>(rows, grads.count, size, grads.index, m, sums);
  }
}

static void gram(const Present& grads, int m, std::int64_t n, double* sums) {
  switch (grads.dtype) {
    case Dtype::float32: return gram_of<float, float>(grads, m, n, sums);
    case Dtype::bfloat16: return gram_of<bfloat16, float>(grads, m, n, sums);
    case Dtype::float16: return gram_of<float16, float>(grads, m, n, sums);
    case Dtype::float64: return gram_of<double, double>(grads, m, n, sums);
  }
}
