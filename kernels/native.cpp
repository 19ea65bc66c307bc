// y = x W^T with 4-bit W in the layout of native.py, for x86 with AVX-512 or AVX2. Built there.
//
// With AVX-512 a group's 16 weights (q - z) s are a table in one register, and a code is an index into it; with AVX2 they are computed.
// float32 weights are exact, since q - z and s have 5 and 11 bits, and bfloat16 weights rounded once. A tile is R rows of W times T
// tokens; every sum is of one thread, over the columns in order, so that it is the same whatever the tile and the number of threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>

namespace {

using at::Tensor;
using c10::BFloat16;
using c10::Half;

constexpr int64_t BLOCK = 128, WORDS = 16, MAX_TOKENS = 8;
constexpr int64_t GRAIN = 1 << 16;  // weights that are worth a thread
constexpr int NARROWEST = 32;       // columns of a group

struct Weight {
  const int32_t* words;   // [rows, blocks * 16]
  const Half* scales;     // [rows, groups]
  const uint8_t* zeros;   // [rows, groups]
  int64_t rows, blocks, groups;
  int64_t width;          // columns of a group

  Weight(const Tensor& words, const Tensor& scales, const Tensor& zeros)
      : words(words.const_data_ptr<int32_t>()), scales(scales.const_data_ptr<Half>()), zeros(zeros.const_data_ptr<uint8_t>()),
        rows(words.size(0)), blocks(words.size(1) / WORDS), groups(scales.size(1)), width(blocks * BLOCK / groups) {}

  int64_t group(int64_t row, int64_t column) const { return row * groups + (groups == 1 ? 0 : column / width); }
};

// What a tile needs to know of the type that is multiplied, and of the instructions: LANES columns are one of STEPS in a block.
#ifdef __AVX512F__
using Sum = __m512;
inline Sum zero() { return _mm512_setzero_ps(); }
inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
constexpr int rows_of_tile(int tokens) { return tokens <= 4 ? 4 : tokens <= 6 ? 3 : 2; }  // sums, values of x and tables fit 32 registers

inline __m512 table_of(const Weight& w, int64_t row, int64_t column) {  // the 16 weights of a group
  const int64_t at = w.group(row, column);
  const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 scale = _mm512_set1_ps(_cvtsh_ss(w.scales[at].x));
  return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(w.zeros[at])), scale);
}

struct Float32 {
  using Value = float;
  static constexpr int STEPS = 8, LANES = BLOCK / STEPS, STEPS_OF_GROUP = NARROWEST / LANES;
  static constexpr bool SCALES_LATER = false;
  using Words = __m512i;
  using Table = __m512;
  static Words load(const int32_t* words) { return _mm512_loadu_si512(words); }
  static Table table(const Weight& w, int64_t row, int64_t block, int step) { return table_of(w, row, block * BLOCK + LANES * step); }
  static __m512 weights(const Table& table, Words words, int step) { return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * step), table); }
  static __m512 exact(const Table& table, Words words, int step) { return weights(table, words, step); }
  static Sum multiply(Sum sum, __m512 weights, const float* x) { return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum); }
  static int64_t column(int step, int lane) { return LANES * step + lane; }
};
#else
using Sum = __m256;
inline Sum zero() { return _mm256_setzero_ps(); }
inline float total(Sum sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
constexpr int rows_of_tile(int tokens) { return tokens == 1 ? 4 : tokens <= 4 ? 2 : 1; }  // of 16 registers

// (w & 15 << 4 i) | 2^23's bits is the float 2^23 + q 16^i for the nibbles 0 to 3, and less 2^23 + z 16^i it is (q - z) 16^i, exactly.
// x is handed over divided by 16^i, and a group's sum is multiplied by its scale: four instructions for 8 weights and a token.
struct Float32 {
  using Value = float;
  static constexpr int STEPS = 16, LANES = BLOCK / STEPS, STEPS_OF_GROUP = NARROWEST / LANES;
  static constexpr bool SCALES_LATER = true;
  static constexpr int PLACES = 4, STEPS_OF_HALF = STEPS / 2;  // nibbles that stay where they are; of the low half of every word
  struct Words {
    __m256i low[2], high[2];
  };
  struct Table {
    __m256 zero[PLACES], scale;
  };
  static Words load(const int32_t* words) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)words), second = _mm256_loadu_si256((const __m256i*)(words + LANES));
    return {{first, second}, {_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16)}};
  }
  static constexpr float place(int step) { return float(1 << 4 * (step / 2 % PLACES)); }
  static Table table(const Weight& w, int64_t row, int64_t block, int step) {
    const int64_t at = w.group(row, block * BLOCK + LANES * step);
    Table found;
    for (int i = 0; i < PLACES; i++) found.zero[i] = _mm256_set1_ps(0x1p23f + w.zeros[at] * place(2 * i));
    found.scale = _mm256_set1_ps(_cvtsh_ss(w.scales[at].x));
    return found;
  }
  static __m256 weights(const Table& table, const Words& words, int step) {  // nibble step / 2 of words 8 (step % 2) to 8 (step % 2) + 7
    const __m256i word = step < STEPS_OF_HALF ? words.low[step % 2] : words.high[step % 2];
    const int i = step / 2 % PLACES;
    const __m256i bits = _mm256_or_si256(_mm256_and_si256(word, _mm256_set1_epi32(15 << 4 * i)), _mm256_set1_epi32(0x4B000000));
    return _mm256_sub_ps(_mm256_castsi256_ps(bits), table.zero[i]);
  }
  static __m256 exact(const Table& table, const Words& words, int step) {
    return _mm256_mul_ps(weights(table, words, step), _mm256_mul_ps(table.scale, _mm256_set1_ps(1 / place(step))));
  }
  static Sum multiply(Sum sum, __m256 weights, const float* x) { return _mm256_fmadd_ps(weights, _mm256_loadu_ps(x), sum); }
  static Sum scaled(Sum sum, Sum of_group, const Table& table) { return _mm256_fmadd_ps(of_group, table.scale, sum); }
  static int64_t column(int step, int lane) { return LANES * step + lane; }
};
#endif

#ifdef __AVX512BF16__
struct Bfloat16 {  // a step is columns 16 i + j and 64 + 16 i + j
  using Value = BFloat16;
  static constexpr int STEPS = 4, LANES = BLOCK / STEPS, STEPS_OF_GROUP = NARROWEST / 16;
  static constexpr bool SCALES_LATER = false;
  using Words = __m512i;
  using Table = __m512i;
  static Words load(const int32_t* words) { return Float32::load(words); }
  static Table table(const Weight& w, int64_t row, int64_t block, int step) {
    const int64_t column = block * BLOCK + 16 * step;
    const __m512 even = table_of(w, row, column);
    return (__m512i)_mm512_cvtne2ps_pbh(w.width < BLOCK ? table_of(w, row, column + 64) : even, even);
  }
  static __m512bh weights(const Table& table, Words words, int step) {
    const __m512i mask = _mm512_set1_epi32(0x000F000F), odd = _mm512_set1_epi32(0x00100000);
    const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * step), mask, odd, 0xEA);  // (a & b) | c
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
  static Sum multiply(Sum sum, __m512bh weights, const BFloat16* x) {
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
  Sum acc[R][T], whole[R][T];  // of a group, and of all before, where scales come later
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = whole[r][t] = zero();
  const int32_t* words[R];
  int64_t rows[R];
  for (int r = 0; r < R; r++) {
    rows[r] = std::min(row + r, w.rows - 1);
    words[r] = w.words + rows[r] * w.blocks * WORDS;
  }
  typename Type::Table table[R];
  const auto close_groups = [&] {
    if constexpr (Type::SCALES_LATER)
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
          whole[r][t] = Type::scaled(whole[r][t], acc[r][t], table[r]);
          acc[r][t] = zero();
        }
  };
  for (int64_t block = 0; block < w.blocks; block++) {
    typename Type::Words word[R];
    for (int r = 0; r < R; r++) {
      word[r] = Type::load(words[r] + block * WORDS);
      table[r] = Type::table(w, rows[r], block, 0);
    }
#pragma GCC unroll 16
    for (int step = 0; step < Type::STEPS; step++) {
      if (SMALL && step && step % Type::STEPS_OF_GROUP == 0) {
        close_groups();
        for (int r = 0; r < R; r++) table[r] = Type::table(w, rows[r], block, step);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto weights = Type::weights(table[r], word[r], step);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) acc[r][t] = Type::multiply(acc[r][t], weights, x + t * Type::LANES);
      }
      x += T * Type::LANES;
    }
    close_groups();
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sums[t * R + r] = total(Type::SCALES_LATER ? whole[r][t] : acc[r][t]);
}

// Tokens [m, columns] in the order in which `tile` reads them, padded with zeros to whole blocks. A tensor's memory is aligned: no load
// straddles cache lines.
template <typename Type, typename X>
Tensor arrange(const X* x, int64_t m, int64_t columns, int64_t blocks) {
  constexpr int LANES = Type::LANES;
  const Tensor arranged = at::zeros({m * blocks * BLOCK}, c10::CppTypeToScalarType<typename Type::Value>::value);
  auto* out = arranged.mutable_data_ptr<typename Type::Value>();
  for (int64_t block = 0; block < blocks; block++)
    for (int step = 0; step < Type::STEPS; step++)
      for (int64_t t = 0; t < m; t++)
        for (int lane = 0; lane < LANES; lane++) {
          const int64_t column = block * BLOCK + Type::column(step, lane);
          if (column >= columns) continue;
          auto& to = out[((block * Type::STEPS + step) * m + t) * LANES + lane];
          if constexpr (Type::SCALES_LATER) to = float(x[t * columns + column]) / Type::place(step);
          else to = x[t * columns + column];
        }
  return arranged;
}

template <typename Type, typename X, int T, bool SMALL>
void tokens(const Weight& w, const X* x, int64_t columns, const float* bias, X* y) {
  constexpr int R = rows_of_tile(T);
  const Tensor arranged = arrange<Type>(x, T, columns, w.blocks);
  const auto* xs = arranged.const_data_ptr<typename Type::Value>();
  const int64_t tiles = (w.rows + R - 1) / R;
  at::parallel_for(0, tiles, std::max<int64_t>(1, GRAIN / (R * w.blocks * BLOCK)), [&](int64_t begin, int64_t end) {
    float sums[R * T];
    for (int64_t i = begin; i < end; i++) {
      tile<Type, R, T, SMALL>(w, i * R, xs, sums);
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

#ifdef __AVX512F__
void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

void store(BFloat16* to, __m512 values) {  // rounded to nearest, ties to even
  const __m512i bits = (__m512i)values, last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#else
void store(float* to, __m256 values) { _mm256_storeu_ps(to, values); }

void store(BFloat16* to, __m256 values) {
  const __m256i bits = (__m256i)values, last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0b1000);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(halves));
}
#endif

template <typename X>
void dequantize_rows(const Weight& w, int64_t first, int64_t count, X* out) {
  const int64_t columns = w.blocks * BLOCK;
  const int steps_of_table = w.groups > 1 && w.width < BLOCK ? Float32::STEPS_OF_GROUP : Float32::STEPS;
  at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t block = 0; block < w.blocks; block++) {
        const auto words = Float32::load(w.words + ((first + row) * w.blocks + block) * WORDS);
        X* to = out + row * columns + block * BLOCK;
        for (int step = 0; step < Float32::STEPS;) {
          const auto table = Float32::table(w, first + row, block, step);
          for (const int end_of_table = step + steps_of_table; step < end_of_table; step++)
            store(to + Float32::LANES * step, Float32::exact(table, words, step));
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
