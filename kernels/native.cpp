// y = x W^T with 4-bit W in the layout of native.py, for x86 with AVX-512. Built there.
//
// A group's 16 weights (q - z) s are a table in one register, and a code is an index into it: float32 weights are exact, bfloat16
// weights rounded once. A tile is R rows of W times T tokens; every sum is of one thread, over the columns in order, so that it is
// the same whatever the tile and the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

using at::Tensor;
using c10::BFloat16;
using c10::Half;

constexpr int64_t BLOCK = 128, WORDS = 16, MAX_TOKENS = 8;
constexpr int64_t GRAIN = 1 << 16;  // weights that are worth a thread

struct Weight {
  const int32_t* words;   // [rows, blocks * 16]
  const Half* scales;     // [rows, groups]
  const uint8_t* zeros;   // [rows, groups]
  int64_t rows, blocks, groups;
  int64_t width;          // columns of a group

  Weight(const Tensor& words, const Tensor& scales, const Tensor& zeros)
      : words(words.const_data_ptr<int32_t>()), scales(scales.const_data_ptr<Half>()), zeros(zeros.const_data_ptr<uint8_t>()),
        rows(words.size(0)), blocks(words.size(1) / WORDS), groups(scales.size(1)), width(blocks * BLOCK / groups) {}

  __m512 table(int64_t row, int64_t column) const {  // the 16 weights of a group
    const int64_t at = row * groups + (groups == 1 ? 0 : column / width);
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(scales[at].x));
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zeros[at])), scale);
  }
};

// What a tile needs to know of the type that is multiplied: 8 steps of 16 columns, or 4 steps of 32 (columns 16 i + j and 64 + 16 i + j).
struct Float32 {
  using Value = float;
  static constexpr int STEPS = 8;
  using Table = __m512;
  static Table table(const Weight& w, int64_t row, int64_t block, int step) { return w.table(row, block * BLOCK + 16 * step); }
  static __m512 weights(const Table& table, __m512i words, int step) { return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * step), table); }
  static __m512 multiply(__m512 sum, __m512 weights, const float* x) { return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum); }
  static int64_t column(int step, int lane) { return 16 * step + lane; }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
  using Value = BFloat16;
  static constexpr int STEPS = 4;
  using Table = __m512i;
  static Table table(const Weight& w, int64_t row, int64_t block, int step) {
    const int64_t column = block * BLOCK + 16 * step;
    const __m512 even = w.table(row, column);
    return (__m512i)_mm512_cvtne2ps_pbh(w.width < BLOCK ? w.table(row, column + 64) : even, even);
  }
  static __m512bh weights(const Table& table, __m512i words, int step) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), odd = _mm512_set1_epi32(0x00100000);
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * step), mask, odd, 0xEA);  // (a & b) | c
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
  static __m512 multiply(__m512 sum, __m512bh weights, const BFloat16* x) {
    return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_loadu_si512(x));
  }
  static int64_t column(int step, int lane) { return 16 * step + lane / 2 + 64 * (lane % 2); }
};
#else
using Bfloat16 = Float32;  // without the instruction: exact weights, at the speed of float32
#endif

// R rows from `row` times T tokens. x: [blocks, steps, T, lanes]; sums: [T, R]. SMALL: several groups in a block.
template <typename Type, int R, int T, bool SMALL>
void tile(const Weight& w, int64_t row, const typename Type::Value* x, float* sums) {
  constexpr int LANES = BLOCK / Type::STEPS;
  __m512 acc[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = _mm512_setzero_ps();
  const int32_t* words[R];
  int64_t rows[R];
  for (int r = 0; r < R; r++) {
    rows[r] = std::min(row + r, w.rows - 1);
    words[r] = w.words + rows[r] * w.blocks * WORDS;
  }
  for (int64_t block = 0; block < w.blocks; block++) {
    __m512i word[R];
    typename Type::Table table[R];
    for (int r = 0; r < R; r++) {
      word[r] = _mm512_loadu_si512(words[r] + block * WORDS);
      table[r] = Type::table(w, rows[r], block, 0);
    }
#pragma GCC unroll 8
    for (int step = 0; step < Type::STEPS; step++) {
      if (SMALL && step && step % 2 == 0)  // the narrowest group is 32 columns
        for (int r = 0; r < R; r++) table[r] = Type::table(w, rows[r], block, step);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto weights = Type::weights(table[r], word[r], step);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) acc[r][t] = Type::multiply(acc[r][t], weights, x + t * LANES);
      }
      x += T * LANES;
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sums[t * R + r] = _mm512_reduce_add_ps(acc[r][t]);
}

// Tokens [m, columns] in the order in which `tile` reads them, padded with zeros to whole blocks.
template <typename Type, typename X>
std::vector<typename Type::Value> arrange(const X* x, int64_t m, int64_t columns, int64_t blocks) {
  constexpr int LANES = BLOCK / Type::STEPS;
  std::vector<typename Type::Value> out(m * blocks * BLOCK, 0);
  for (int64_t block = 0; block < blocks; block++)
    for (int step = 0; step < Type::STEPS; step++)
      for (int64_t t = 0; t < m; t++)
        for (int lane = 0; lane < LANES; lane++) {
          const int64_t column = block * BLOCK + Type::column(step, lane);
          if (column < columns) out[((block * Type::STEPS + step) * m + t) * LANES + lane] = x[t * columns + column];
        }
  return out;
}

template <typename Type, typename X, int T, bool SMALL>
void tokens(const Weight& w, const X* x, int64_t columns, const float* bias, X* y) {
  constexpr int R = T <= 4 ? 4 : T <= 6 ? 3 : 2;  // R T sums, T values of x and R tables fit 32 registers
  const auto arranged = arrange<Type>(x, T, columns, w.blocks);
  const int64_t tiles = (w.rows + R - 1) / R;
  at::parallel_for(0, tiles, std::max<int64_t>(1, GRAIN / (R * w.blocks * BLOCK)), [&](int64_t begin, int64_t end) {
    float sums[R * T];
    for (int64_t i = begin; i < end; i++) {
      tile<Type, R, T, SMALL>(w, i * R, arranged.data(), sums);
      for (int64_t row = i * R; row < std::min((i + 1) * R, w.rows); row++)
        for (int t = 0; t < T; t++) y[t * w.rows + row] = static_cast<X>(sums[t * R + row - i * R] + (bias ? bias[row] : 0));
    }
  });
}

template <typename Type, typename X, int T = MAX_TOKENS>
void up_to(int64_t m, const Weight& w, const X* x, int64_t columns, const float* bias, X* y) {
  if (m == T) {
    if (w.groups > 1 && w.width < BLOCK) tokens<Type, X, T, true>(w, x, columns, bias, y);
    else tokens<Type, X, T, false>(w, x, columns, bias, y);
  } else if constexpr (T > 1) {
    up_to<Type, X, T - 1>(m, w, x, columns, bias, y);
  }
}

template <typename Type, typename X>
void all(const Tensor& x, const Weight& w, const float* bias, Tensor& y) {
  const int64_t m = x.size(0), columns = x.size(1), pieces = (m + MAX_TOKENS - 1) / MAX_TOKENS;
  for (int64_t i = 0; i < pieces; i++) {
    const int64_t begin = i * m / pieces, end = (i + 1) * m / pieces;
    up_to<Type, X>(end - begin, w, x.const_data_ptr<X>() + begin * columns, columns, bias, y.mutable_data_ptr<X>() + begin * w.rows);
  }
}

Tensor linear(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& zeros, const std::optional<Tensor>& bias) {
  const Weight w(words, scales, zeros);
  Tensor y = at::empty({x.size(0), w.rows}, x.options());
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) all<Float32, float>(x, w, b, y);
  else if (x.scalar_type() == at::kHalf) all<Float32, Half>(x, w, b, y);
  else all<Bfloat16, BFloat16>(x, w, b, y);
  return y;
}

void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

void store(BFloat16* to, __m512 values) {  // rounded to nearest, ties to even
  const __m512i bits = (__m512i)values, last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <typename X>
void dequantize_rows(const Weight& w, int64_t first, int64_t count, X* out) {
  const int64_t columns = w.blocks * BLOCK;
  const int steps_of_table = w.groups > 1 && w.width < BLOCK ? 2 : Float32::STEPS;
  at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t block = 0; block < w.blocks; block++) {
        const __m512i words = _mm512_loadu_si512(w.words + ((first + row) * w.blocks + block) * WORDS);
        X* to = out + row * columns + block * BLOCK;
        for (int step = 0; step < Float32::STEPS;) {
          const auto table = Float32::table(w, first + row, block, step);
          for (const int end_of_table = step + steps_of_table; step < end_of_table; step++)
            store(to + 16 * step, Float32::weights(table, words, step));
        }
      }
  });
}

// Rows of W from `first` into out: [rows, blocks * 128], float32 or bfloat16.
void dequantize(const Tensor& words, const Tensor& scales, const Tensor& zeros, int64_t first, Tensor out) {
  const Weight w(words, scales, zeros);
  if (out.scalar_type() == at::kFloat) dequantize_rows(w, first, out.size(0), out.mutable_data_ptr<float>());
  else dequantize_rows(w, first, out.size(0), out.mutable_data_ptr<BFloat16>());
}

}  // namespace

TORCH_LIBRARY(awq_hf_native, m) {
  m.def("linear(Tensor x, Tensor words, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor");
  m.def("dequantize(Tensor words, Tensor scales, Tensor zeros, int begin, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(awq_hf_native, CPU, m) {
  m.impl("linear", linear);
  m.impl("dequantize", dequantize);
}
