// How a float32 weight is kept in bfloat16 memory, beside rounding to nearest. Included once per
// target, inside its namespace. raco_fast/backends/rounding.py, the plain twin, says what each one is for.

// What the random bits of elements have in common whose numbers have the high half `high`.
struct Keys {
  std::int64_t high = -1;
  std::uint32_t first = 0, second = 0;
};

RACO_INLINE std::uint32_t mixed(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

RACO_INLINE Keys keys_of(const Place& place, std::int64_t high) {
  const std::uint32_t of_step = mixed(place.seed ^ (place.step * 0xc2b2ae35u));
  const std::uint32_t of_high =
      place.tensor * 0x9e3779b1u + static_cast<std::uint32_t>(high) * 0x85ebca77u;
  const std::uint32_t first = mixed(of_step ^ of_high);
  return {high, first, mixed(first ^ of_high)};
}

// 16 random bits for the element whose number has the low half `element`.
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

// n weights of elements with consecutive numbers, the first with the low half `first`.
static void store_run(std::uint32_t first, const Keys& keys, std::int64_t n,
                      const float* __restrict w, bfloat16* __restrict p) {
  for (std::int64_t k = 0; k < n; ++k) {
    const std::uint32_t bits = as_bits(w[k]);
    const std::uint32_t noise = random_bits(first + static_cast<std::uint32_t>(k), keys);
    p[k].bits = static_cast<std::uint16_t>((bits + (is_nan(bits) ? 0u : noise)) >> 16);
  }
}

// Run by run: a run ends with its row, and where the high half of the numbers changes. `keys` are
// those of the run before, nearly always of this one too.
static void store_stochastic(const Place& place, std::int64_t start, std::int64_t n, const float* w,
                             bfloat16* p, Keys& keys) {
  std::int64_t row = 0, column = place.start + start;
  if (place.width > 0) row = column / place.width, column %= place.width;
  for (std::int64_t k = 0, run; k < n; k += run) {
    const std::int64_t number = place.offset + row * place.pitch + column;
    const std::int64_t to_edge = (std::int64_t{1} << 32) - (number & 0xffffffff);
    run = n - k < to_edge ? n - k : to_edge;
    if (place.width > 0 && run >= place.width - column) {
      run = place.width - column;
      column = 0, ++row;
    } else {
      column += run;
    }
    if (number >> 32 != keys.high) keys = keys_of(place, number >> 32);
    store_run(static_cast<std::uint32_t>(number), keys, run, w + k, p + k);
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
                          Slice param, Keys& keys) {
  bfloat16* p = static_cast<bfloat16*>(param.data) + start;
  switch (step.rounding) {
    case Rounding::stochastic: store_stochastic(step.place, start, n, w, p, keys); return true;
    case Rounding::split: store_split(step, start, n, w, p); return true;
    default: return false;
  }
}

// Float64 weights are stored as they are.
static void add_residual(const Step&, std::int64_t, std::int64_t, double*) {}
static bool store_rounded(const Step&, std::int64_t, std::int64_t, const double*, Slice, Keys&) {
  return false;
}
