// How a float32 weight is kept in bfloat16 memory, beside rounding to nearest. Included once per
// target, inside its namespace. raco_fast/backends/rounding.py, the plain twin, says what each one is for.

// 16 random bits for the element whose index has the low half `element`.
RACO_INLINE std::uint32_t random_bits(std::uint32_t element, const Keys& keys) {
  std::uint32_t x = element ^ keys.first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + keys.second) * 0x846ca68bu;
  return (x ^ (x >> 16)) & 0xffffu;
}

RACO_INLINE bool is_nan(std::uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// From the weights as stored, n from element `start` of the chunk on, to the ones they stand for.
static void add_residual(const Step& step, std::int64_t start, std::int64_t n,
                         float* __restrict w) {
  if (step.rounding != Rounding::split) return;
  const std::int16_t* __restrict low = static_cast<const std::int16_t*>(step.residual) + start;
  for (std::int64_t k = 0; k < n; ++k)
    w[k] = as_float(as_bits(w[k]) + static_cast<std::uint32_t>(std::int32_t{low[k]}));
}

static void store_stochastic(const Step& step, std::int64_t start, std::int64_t n,
                             const float* __restrict w, bfloat16* __restrict p) {
  const std::uint32_t first = step.keys.element + static_cast<std::uint32_t>(start);
  for (std::int64_t k = 0; k < n; ++k) {
    const std::uint32_t bits = as_bits(w[k]);
    const std::uint32_t noise = random_bits(first + static_cast<std::uint32_t>(k), step.keys);
    p[k].bits = static_cast<std::uint16_t>((bits + (is_nan(bits) ? 0u : noise)) >> 16);
  }
}

// Half up, not to even: a tie would leave +32768, which an int16 cannot hold.
static void store_split(const Step& step, std::int64_t start, std::int64_t n,
                        const float* __restrict w, bfloat16* __restrict p) {
  std::int16_t* __restrict low = static_cast<std::int16_t*>(step.residual) + start;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::uint32_t bits = as_bits(w[k]);
    const std::uint32_t high = is_nan(bits) ? 0x7fc0u : (bits + 0x8000u) >> 16;
    p[k].bits = static_cast<std::uint16_t>(high);
    low[k] = static_cast<std::int16_t>(static_cast<std::uint16_t>(bits - (high << 16)));
  }
}

// n weights to the bfloat16 parameter `param`; false where they are to be rounded to nearest.
static bool store_rounded(const Step& step, std::int64_t start, std::int64_t n, const float* w,
                          Slice param) {
  bfloat16* p = static_cast<bfloat16*>(param.data) + start;
  switch (step.rounding) {
    case Rounding::stochastic: store_stochastic(step, start, n, w, p); return true;
    case Rounding::split: store_split(step, start, n, w, p); return true;
    default: return false;
  }
}

// Float64 weights are stored as they are.
static void add_residual(const Step&, std::int64_t, std::int64_t, double*) {}
static bool store_rounded(const Step&, std::int64_t, std::int64_t, const double*, Slice) {
  return false;
}
