// Products of small matrices whose operands lie in the caches, in tiles of vector registers.

#pragma once

#include "fivefold.h"

namespace fivefold {

// Rows and packs of a tile: its sums fill the registers that the CPU has.
#ifdef __AVX512F__
constexpr int kTileRows = 8, kTilePacks = 2;
#else
constexpr int kTileRows = 4, kTilePacks = 1;
#endif

// The least multiple of a pack's values that is no less than n.
template <class C>
constexpr int64_t padded(int64_t n) {
  return (n + (kLanes<C> - 1)) / kLanes<C> * kLanes<C>;
}

// Element (i, k) is at[i * row + k * col].
template <class C>
struct Left {
  const C* at;
  int64_t row, col;
};

// Element (k, j) is at[k * row + j]; rows are whole packs.
template <class C>
struct Right {
  const C* at;
  int64_t row;
};

// kTileRows rows by kPacks packs of a product.
template <class C, int kPacks>
struct Tile {
  Pack<C> sums[kTileRows][kPacks] = {};

  // Adds left[:, from:to] times right[from:to, :].
  FIVEFOLD_INLINE inline void add(Left<C> left, Right<C> right, int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      Pack<C> row[kPacks];
#pragma GCC unroll 2
      for (int j = 0; j < kPacks; ++j) row[j] = load(right.at + (k * right.row + j * kLanes<C>));
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const C scale = left.at[i * left.row + k * left.col];
#pragma GCC unroll 2
        for (int j = 0; j < kPacks; ++j) sums[i][j] += scale * row[j];
      }
    }
  }

  // f(i, j, sum) for row i and the pack that begins at column j, counted from the tile's corner.
  template <class F>
  FIVEFOLD_INLINE inline void each(F f) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kPacks; ++j) f(i, j * kLanes<C>, sums[i][j]);
    }
  }
};

// f(i, j, tile) for zeroed tiles that cover rows [0, rows) and columns [0, columns(i)); i and j are
// a tile's corner. rows and columns are whole packs.
template <class C, class Columns, class F>
FIVEFOLD_INLINE inline void each_tile(int64_t rows, Columns columns, F f) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t end = columns(i);
    int64_t j = 0;
    for (; j + kTilePacks * kLanes<C> <= end; j += kTilePacks * kLanes<C>)
      f(i, j, Tile<C, kTilePacks>());
    for (; j < end; j += kLanes<C>) f(i, j, Tile<C, 1>());
  }
}

// f(i, j, tile) over a matrix.
template <class C, class F>
FIVEFOLD_INLINE inline void each_tile_of(int64_t rows, int64_t columns, F f) {
  each_tile<C>(rows, [=](int64_t) { return columns; }, f);
}

// f(i, j, tile) over the packs on and below the diagonal.
template <class C, class F>
FIVEFOLD_INLINE inline void each_lower_tile(int64_t rows, F f) {
  each_tile<C>(rows, [](int64_t i) { return padded<C>(i + kTileRows); }, f);
}

// to[j * to_row + i] = from[i * from_row + j] for whole packs of rows.
template <class C>
inline void transpose(const C* from, int64_t from_row, int64_t rows, int64_t columns, C* to,
                      int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes<C>) {
    for (int64_t j = 0; j < columns; ++j) {
      C* lanes = &to[j * to_row + i];
      const C* column = &from[i * from_row + j];
      for (int64_t lane = 0; lane < kLanes<C>; ++lane) lanes[lane] = column[lane * from_row];
    }
  }
}

}  // namespace fivefold
