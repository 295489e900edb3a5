// G0 and the AdamW step over one run of elements. Included once per target, inside its namespace.
//
// Block by block, in the cache: G0 is summed into a buffer, parameters and states that are not
// stored in the type of the arithmetic T (float, or double for float64) are widened into buffers,
// the step is taken, and they are rounded back, once. What is stored as T is updated where it lies,
// and up to kSummedOnTheWay gradients of that type are summed in the loop of the step, so that its
// square roots and divisions run while the next elements are on their way from memory. The loops
// are elementwise and left to the compiler's vectoriser.

template <class S, class T>
static void widen_all(const void* from, std::int64_t n, T* __restrict to) {
  const S* __restrict source = static_cast<const S*>(from);
  for (std::int64_t k = 0; k < n; ++k) widen(source[k], to[k]);
}

template <class S, class T>
static void narrow_all(const T* __restrict from, std::int64_t n, void* to) {
  S* __restrict target = static_cast<S*>(to);
  for (std::int64_t k = 0; k < n; ++k) narrow(from[k], target[k]);
}

template <class S, class T>
static void weighted_sum(const Present& grads, std::int64_t start, std::int64_t n,
                         T* __restrict total) {
  for (int i = 0; i < grads.count; ++i) {
    const S* __restrict g = static_cast<const S*>(grads.data[i]) + start;
    const T a = static_cast<T>(grads.alpha[i]);
    if (i == 0) {
      for (std::int64_t k = 0; k < n; ++k) {
        T x;
        widen(g[k], x);
        total[k] = a * x;
      }
    } else {
      for (std::int64_t k = 0; k < n; ++k) {
        T x;
        widen(g[k], x);
        total[k] += a * x;
      }
    }
  }
  if (grads.count == 0)
    for (std::int64_t k = 0; k < n; ++k) total[k] = T(0);
}

static void sum_gradients(const Present& grads, std::int64_t start, std::int64_t n, float* total) {
  switch (grads.dtype) {
    case Dtype::bfloat16: return weighted_sum<bfloat16>(grads, start, n, total);
    case Dtype::float16: return weighted_sum<float16>(grads, start, n, total);
    default: return weighted_sum<float>(grads, start, n, total);
  }
}

static void sum_gradients(const Present& grads, std::int64_t start, std::int64_t n, double* total) {
  weighted_sum<double>(grads, start, n, total);
}

// A block of a tensor in the type of the arithmetic: where it lies, or in `buffer`.
static float* opened(Slice tensor, std::int64_t start, std::int64_t n, float* buffer) {
  switch (tensor.dtype) {
    case Dtype::bfloat16:
      widen_all<bfloat16>(static_cast<bfloat16*>(tensor.data) + start, n, buffer);
      return buffer;
    case Dtype::float16:
      widen_all<float16>(static_cast<float16*>(tensor.data) + start, n, buffer);
      return buffer;
    default: return static_cast<float*>(tensor.data) + start;
  }
}

static double* opened(Slice tensor, std::int64_t start, std::int64_t, double*) {
  return static_cast<double*>(tensor.data) + start;
}

// The block back to the tensor, rounded to its dtype; nothing to do where it was opened in place.
template <class T>
static void close_in_place(Slice tensor, std::int64_t start, std::int64_t n, const T* block) {
  T* target = static_cast<T*>(tensor.data) + start;
  if (block != target) std::memcpy(target, block, sizeof(T) * static_cast<std::size_t>(n));
}

static void close(Slice tensor, std::int64_t start, std::int64_t n, const float* block) {
  switch (tensor.dtype) {
    case Dtype::bfloat16:
      return narrow_all<bfloat16>(block, n, static_cast<bfloat16*>(tensor.data) + start);
    case Dtype::float16:
      return narrow_all<float16>(block, n, static_cast<float16*>(tensor.data) + start);
    default: return close_in_place(tensor, start, n, block);
  }
}

static void close(Slice tensor, std::int64_t start, std::int64_t n, const double* block) {
  close_in_place(tensor, start, n, block);
}

constexpr int kSummedOnTheWay = 4;

// As instructions: with -fno-math-errno (setup.py) the compiler vectorises these builtins.
RACO_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
RACO_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The step along the sum of C gradients; for C = 1, along g0 itself.
template <class T, int C>
static void adamw_block(T* __restrict p, T* __restrict m, T* __restrict v, const T* const* grads,
                        const double* alpha, std::int64_t n, const Step& step) {
  const T decay = static_cast<T>(step.decay), eps = static_cast<T>(step.eps);
  const T beta1 = static_cast<T>(step.beta1), rest1 = static_cast<T>(1.0 - step.beta1);
  const T beta2 = static_cast<T>(step.beta2), rest2 = static_cast<T>(1.0 - step.beta2);
  const T size = static_cast<T>(step.step_size), root = static_cast<T>(step.root_correction);
  const T* __restrict g[C];
  T a[C];
  for (int i = 0; i < C; ++i) g[i] = grads[i], a[i] = static_cast<T>(alpha[i]);
  for (std::int64_t k = 0; k < n; ++k) {
    T g0 = a[0] * g[0][k];
#pragma GCC unroll 4
    for (int i = 1; i < C; ++i) g0 += a[i] * g[i][k];
    m[k] = beta1 * m[k] + rest1 * g0;
    v[k] = beta2 * v[k] + rest2 * (g0 * g0);
    p[k] = decay * p[k] - size * (m[k] / (square_root(v[k]) * root + eps));
  }
}

// The gradients of one chunk as the step's loop reads them; none where they have to be summed first.
template <class T>
static int direct(const Present& grads, const T** rows) {
  const Dtype wanted = std::is_same<T, double>::value ? Dtype::float64 : Dtype::float32;
  if (grads.dtype != wanted || grads.count > kSummedOnTheWay) return 0;
  for (int i = 0; i < grads.count; ++i) rows[i] = static_cast<const T*>(grads.data[i]);
  return grads.count;
}

template <class T>
static void adamw_of(const Present& grads, std::int64_t n, Slice param, Slice exp_avg,
                     Slice exp_avg_sq, const Step& step) {
  alignas(64) T g0[kBlock], p_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock];
  const T* rows[kSummedOnTheWay];
  const int count = direct(grads, rows);
  const double one = 1.0;
  Keys keys;
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t size = n - start < kBlock ? n - start : kBlock;
    T* p = opened(param, start, size, p_buffer);
    add_residual(step, start, size, p);
    T* m = opened(exp_avg, start, size, m_buffer);
    T* v = opened(exp_avg_sq, start, size, v_buffer);
    const T* at[kSummedOnTheWay];
    for (int i = 0; i < count; ++i) at[i] = rows[i] + start;
    switch (count) {
      case 1: adamw_block<T, 1>(p, m, v, at, grads.alpha, size, step); break;
      case 2: adamw_block<T, 2>(p, m, v, at, grads.alpha, size, step); break;
      case 3: adamw_block<T, 3>(p, m, v, at, grads.alpha, size, step); break;
      case 4: adamw_block<T, 4>(p, m, v, at, grads.alpha, size, step); break;
      default:
        sum_gradients(grads, start, size, g0);
        at[0] = g0;
        adamw_block<T, 1>(p, m, v, at, &one, size, step);
    }
    if (!store_rounded(step, start, size, p, param, keys)) close(param, start, size, p);
    close(exp_avg, start, size, m);
    close(exp_avg_sq, start, size, v);
  }
}

static void adamw(const Present& grads, std::int64_t n, Slice param, Slice exp_avg,
                  Slice exp_avg_sq, const Step& step) {
  if (param.dtype == Dtype::float64)
    adamw_of<double>(grads, n, param, exp_avg, exp_avg_sq, step);
  else
    adamw_of<float>(grads, n, param, exp_avg, exp_avg_sq, step);
}

// The sum is finished in the buffer before out is written: out may be one of the gradients.
template <class T>
static void combine_of(const Present& grads, std::int64_t n, Slice out) {
  alignas(64) T g0[kBlock];
  for (std::int64_t start = 0; start < n; start += kBlock) {
    const std::int64_t size = n - start < kBlock ? n - start : kBlock;
    sum_gradients(grads, start, size, g0);
    close(out, start, size, g0);
  }
}

static void combine(const Present& grads, std::int64_t n, Slice out) {
  if (out.dtype == Dtype::float64)
    combine_of<double>(grads, n, out);
  else
    combine_of<float>(grads, n, out);
}
