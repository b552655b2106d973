// A sparse matrix as product kernels read it: groups of rows, one row in each lane of a register,
// and slots that hold one nonzero of every row of a group.
//
// A slot's nonzeros may come from anywhere (kGather), or from a window of two or four registers of
// the vector (kTiles), so that a permutation of registers takes the place of a gather from memory.
// Windows start at every register, so a nonzero has a choice of slots and lanes need not have
// equally many nonzeros in each part of a row: slots are opened as late as possible and filled by
// the earliest deadline, which needs the fewest. Some slots in a row, a run, share a window, so
// that it is loaded once for them and nothing has to be predicted.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <numeric>

#include "fivefold.h"

namespace sparse_rnn {

// kRows is the matrix as it comes, for many columns of vectors at once.
enum class Kind : int64_t { kRows = 0, kGather = 1, kTiles = 2 };

// Values of one register in float32, and what a window slides by.
constexpr int64_t kBlock = 16;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kLargePage = 1 << 21;

// How tiles are made: registers of a window, slots of a run, and bits of an index. A lane has the
// indices of a run in one word of 16 or 32 bits.
struct Tiling {
  int64_t window, run, bits;

  int64_t word_bytes() const { return run * bits <= 16 ? 2 : 4; }
  double bytes() const { return run * kBlock * 4.0 + kBlock * word_bytes() + 2; }

  // Nanoseconds of a run for so many vectors on a core that computes, and on one that waits for
  // what a cache beyond its own sends; measured on a Zen 5 at 4 GHz.
  double cost(int64_t batch, bool near) const {
    const double permuting = window == 2 ? 0.2 : 0.38;
    const double computing = run * (0.1 + batch * permuting) + batch * window * 0.09;
    return std::max(computing, bytes() / (near ? 150 : 105));
  }
};
constexpr Tiling kTilings[] = {{2, 3, 5}, {2, 6, 5}, {4, 5, 6}};
constexpr double kNearBytes = 1 << 20;

// Memory that begins at a cache line, or where much is asked for at a large page: prefetchers stop
// at the ends of pages, and small ones lie in a cache as they happen to.
template <class T>
class Aligned {
 public:
  void resize(int64_t count) {
    const int64_t bytes = count * sizeof(T) + kCacheLine;
    const int64_t unit = bytes < kLargePage / 2 ? kCacheLine : kLargePage;
    const int64_t whole = (bytes + unit - 1) / unit * unit;
    memory_.reset(static_cast<T*>(std::aligned_alloc(unit, whole)));
    if (memory_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == kLargePage) madvise(static_cast<void*>(memory_.get()), whole, MADV_HUGEPAGE);
#endif
    std::memset(static_cast<void*>(memory_.get()), 0, bytes);
    count_ = count;
  }
  T* data() const { return memory_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t count_ = 0;
};

// Rows of nonzeros with the place of each in the caller's array of values.
struct Rows {
  int64_t num_rows, num_cols;
  std::vector<int64_t> begin;
  std::vector<int32_t> col, source;

  Rows(const int32_t* crow, const int32_t* cols, int64_t rows, int64_t width)
      : num_rows(rows), num_cols(width), begin(crow, crow + rows + 1),
        col(cols, cols + crow[rows]), source(crow[rows]) {
    std::iota(source.begin(), source.end(), 0);
  }

  Rows transposed() const {
    Rows other(*this);
    std::swap(other.num_rows, other.num_cols);
    other.begin.assign(num_cols + 1, 0);
    for (const int32_t c : col) ++other.begin[c + 1];
    std::partial_sum(other.begin.begin(), other.begin.end(), other.begin.begin());
    std::vector<int64_t> next(other.begin.begin(), other.begin.end() - 1);
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t i = begin[row]; i < begin[row + 1]; ++i) {
        const int64_t at = next[col[i]]++;
        other.col[at] = static_cast<int32_t>(row);
        other.source[at] = source[i];
      }
    }
    return other;
  }

  int64_t count(int64_t row) const { return begin[row + 1] - begin[row]; }
};

// Up to 16 rows, one in a lane; row -1 is nobody's.
struct Group {
  int32_t rows[kBlock];
  int64_t first_slot, num_slots;
  // Rows follow each other, none is missing, so that sums are stored as one register.
  bool contiguous;
};

// Units and groups of one member of the gang.
struct Part {
  int64_t first_unit, last_unit;
  std::vector<int32_t> rows;
  std::vector<Group> groups;
};

// What the rows of a group need of slots, window by window.
class Schedule {
 public:
  Schedule(const Rows& rows, const int32_t* group, const Tiling& tiling)
      : tiling_(tiling), blocks_((rows.num_cols + kBlock - 1) / kBlock) {
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const int32_t row = group[lane];
      at_[lane] = row < 0 ? 0 : rows.begin[row];
      end_[lane] = row < 0 ? 0 : rows.begin[row + 1];
    }
  }

  // put(block, lane_entries): one call for a slot; entries are indices into rows.col, -1 for none.
  template <class F>
  int64_t run(const Rows& rows, F put) {
    int64_t slots = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      // The window of this block is the last one that holds the block, so what is left of it must
      // be done now; columns rise, so a lane's next nonzero is always its most urgent one.
      const int64_t width = (due(rows, block) + tiling_.run - 1) / tiling_.run * tiling_.run;
      for (int64_t i = 0; i < width; ++i, ++slots) {
        int64_t entries[kBlock];
        for (int64_t lane = 0; lane < kBlock; ++lane) {
          const bool inside =
              at_[lane] < end_[lane] && rows.col[at_[lane]] < (block + tiling_.window) * kBlock;
          entries[lane] = inside ? at_[lane]++ : -1;
        }
        put(block, entries);
      }
    }
    return slots;
  }

 private:
  int64_t due(const Rows& rows, int64_t block) const {
    int64_t most = 0;
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      int64_t i = at_[lane];
      while (i < end_[lane] && rows.col[i] < (block + 1) * kBlock) ++i;
      most = std::max(most, i - at_[lane]);
    }
    return most;
  }

  Tiling tiling_;
  int64_t blocks_;
  int64_t at_[kBlock], end_[kBlock];
};

// A matrix packed for a number of threads.
struct Packed {
  Kind kind;
  Tiling tiling{};
  int64_t lanes, num_rows, num_cols, num_values, num_slots = 0, element_bytes;
  std::vector<Part> parts;
  std::vector<int64_t> begin;    // kRows: as the caller has them
  Aligned<int32_t> index;        // kRows and kGather: columns
  Aligned<uint8_t> local_index;  // kTiles: words of places in the window, one for a lane and run
  Aligned<uint16_t> block;       // kTiles: first register of the window, one for a run
  Aligned<int32_t> source;       // of each entry in the caller's values, -1 for none
  Aligned<uint8_t> values;
  std::mutex mutex;
  uint64_t fingerprint = 0;
  bool filled = false;

  // gates: rows of a unit, which stay in one part; batch: vectors that the form is best for.
  Packed(const Rows& rows, int64_t gates, Kind kind, int64_t batch, int64_t lanes,
         int64_t num_parts, int64_t element_bytes)
      : kind(kind), lanes(lanes), num_rows(rows.num_rows), num_cols(rows.num_cols),
        num_values(static_cast<int64_t>(rows.col.size())), element_bytes(element_bytes) {
    deal(rows, gates, num_parts);
    if (kind == Kind::kRows)
      keep(rows);
    else
      pack(rows, batch);
  }

  int64_t bytes() const {
    return index.size() * 4 + local_index.size() + block.size() * 2 + values.size();
  }

 private:
  void pack(const Rows& rows, int64_t batch) {
    for (Part& part : parts) group(rows, part);
    if (kind == Kind::kTiles) tile(rows, batch);
    for (Part& part : parts) {
      for (Group& each : part.groups) {
        each.first_slot = num_slots;
        each.num_slots = count_slots(rows, each, tiling);
        num_slots += each.num_slots;
      }
    }
    index.resize(kind == Kind::kGather ? num_slots * lanes : 0);
    if (kind == Kind::kTiles) {
      block.resize(num_slots / tiling.run);
      local_index.resize(block.size() * lanes * tiling.word_bytes());
    }
    source.resize(num_slots * lanes);
    values.resize(num_slots * lanes * element_bytes);
    for (const Part& part : parts)
      for (const Group& each : part.groups) fill(rows, each);
  }

  // Neighbouring units go to one part, in multiples of a register, so that parts have nonzeros in
  // equal number as nearly as may be. A unit costs as much as some nonzeros besides.
  void deal(const Rows& rows, int64_t gates, int64_t num_parts) {
    const int64_t units = rows.num_rows / std::max<int64_t>(gates, 1);
    constexpr int64_t kUnitCost = 8;
    const auto cost = [&](int64_t unit) {
      int64_t sum = kUnitCost;
      for (int64_t g = 0; g < gates; ++g) sum += rows.count(g * units + unit);
      return sum;
    };
    int64_t left = 0;
    for (int64_t unit = 0; unit < units; ++unit) left += cost(unit);
    int64_t unit = 0;
    for (int64_t i = 0; i < num_parts; ++i) {
      Part part;
      part.first_unit = unit;
      const int64_t share = left / (num_parts - i);
      int64_t mine = 0;
      while (unit < units && (i + 1 == num_parts || mine < share)) {
        for (int64_t end = std::min(units, unit + kBlock); unit < end; ++unit) mine += cost(unit);
      }
      left -= mine;
      part.last_unit = unit;
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t u = part.first_unit; u < part.last_unit; ++u)
          part.rows.push_back(static_cast<int32_t>(g * units + u));
      parts.push_back(std::move(part));
    }
  }

  void keep(const Rows& rows) {
    begin = rows.begin;
    index.resize(num_values);
    source.resize(num_values);
    values.resize(num_values * element_bytes);
    std::copy(rows.col.begin(), rows.col.end(), index.data());
    std::copy(rows.source.begin(), rows.source.end(), source.data());
  }

  // Rows with equally many nonzeros share a group, the longest first; equal ones stay in order.
  void group(const Rows& rows, Part& part) {
    std::vector<int32_t> order(part.rows);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return rows.count(a) > rows.count(b); });
    for (size_t first = 0; first < order.size(); first += lanes) {
      Group each;
      each.contiguous = true;
      for (int64_t lane = 0; lane < kBlock; ++lane) {
        const bool there = lane < lanes && first + lane < order.size();
        each.rows[lane] = there ? order[first + lane] : -1;
        if (lane < lanes) each.contiguous &= there && each.rows[lane] == each.rows[0] + lane;
      }
      if (rows.count(each.rows[0]) > 0) part.groups.push_back(each);
    }
  }

  // The tiling that costs least for so many vectors.
  void tile(const Rows& rows, int64_t batch) {
    double least = 0;
    for (const Tiling& candidate : kTilings) {
      int64_t slots = 0;
      for (const Part& part : parts)
        for (const Group& each : part.groups) slots += count_slots(rows, each, candidate);
      const double runs = static_cast<double>(slots) / candidate.run;
      const bool near = runs * candidate.bytes() < kNearBytes * parts.size();
      const double cost = runs * candidate.cost(std::min<int64_t>(batch, 4), near);
      if (tiling.run == 0 || cost < least) {
        tiling = candidate;
        least = cost;
      }
    }
  }

  int64_t count_slots(const Rows& rows, const Group& group, const Tiling& candidate) const {
    if (kind == Kind::kTiles)
      return Schedule(rows, group.rows, candidate).run(rows, [](int64_t, const int64_t*) {});
    return rows.count(group.rows[0]);  // the longest
  }

  // Writes a place in a window into its lane's word.
  void put_index(int64_t slot, int64_t lane, int64_t place) {
    const int64_t bytes = tiling.word_bytes();
    uint8_t* at = local_index.data() + (slot / tiling.run * lanes + lane) * bytes;
    uint32_t word = 0;
    std::memcpy(&word, at, bytes);
    word |= static_cast<uint32_t>(place) << (slot % tiling.run * tiling.bits);
    std::memcpy(at, &word, bytes);
  }

  void fill(const Rows& rows, const Group& group) {
    int64_t slot = group.first_slot;
    const auto put = [&](int64_t first_block, const int64_t* entries) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t entry = entries[lane], to = slot * lanes + lane;
        source[to] = entry < 0 ? -1 : rows.source[entry];
        const int32_t col = entry < 0 ? 0 : rows.col[entry];
        if (kind == Kind::kGather)
          index[to] = col;
        else if (entry >= 0)
          put_index(slot, lane, col - first_block * kBlock);
      }
      if (kind == Kind::kTiles) block[slot / tiling.run] = static_cast<uint16_t>(first_block);
      ++slot;
    };
    if (kind == Kind::kTiles) {
      Schedule(rows, group.rows, tiling).run(rows, put);
      return;
    }
    for (int64_t i = 0; i < group.num_slots; ++i) {
      int64_t entries[kBlock];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int32_t row = group.rows[lane];
        entries[lane] = row >= 0 && i < rows.count(row) ? rows.begin[row] + i : -1;
      }
      put(0, entries);
    }
  }
};

// A number that differs for sure where one value differs, and almost surely where more do.
inline uint64_t fingerprint_of(const uint8_t* bytes, int64_t size) {
  using Bits = fivefold::PackBits<float>;
  constexpr int64_t kStreams = 4, kStep = kStreams * sizeof(Bits);
  Bits sums[kStreams] = {};
  for (int64_t at = 0; at < size; at += kStep) {
    Bits read[kStreams] = {};
    std::memcpy(read, bytes + at, std::min<int64_t>(kStep, size - at));
    for (int64_t i = 0; i < kStreams; ++i) sums[i] = sums[i] * 0x9e3779b1u + read[i];
  }
  uint64_t result = static_cast<uint64_t>(size);
  for (const Bits& sum : sums)
    for (int64_t lane = 0; lane < kBlock; ++lane)
      result = result * 0x9e3779b97f4a7c15u + sum[lane];
  return result;
}

// Takes the caller's values over where they are not those of the last call.
template <class T>
void refresh(Packed& packed, const T* values, int64_t num_threads) {
  std::lock_guard<std::mutex> guard(packed.mutex);
  const auto* bytes = reinterpret_cast<const uint8_t*>(values);
  constexpr int64_t kPiece = 1 << 16;
  const int64_t size = packed.num_values * sizeof(T), pieces = (size + kPiece - 1) / kPiece;
  std::vector<uint64_t> found(pieces);
  fivefold::parallel_for(0, pieces, 4, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t i = from; i < to; ++i)
      found[i] = fingerprint_of(bytes + i * kPiece, std::min(kPiece, size - i * kPiece));
  });
  uint64_t fingerprint = 0;
  for (const uint64_t piece : found) fingerprint = fingerprint * 0x9e3779b97f4a7c15u + piece;
  if (packed.filled && packed.fingerprint == fingerprint) return;
  T* to = reinterpret_cast<T*>(packed.values.data());
  const int32_t* source = packed.source.data();
  fivefold::parallel_for(0, packed.source.size(), 1 << 14, num_threads,
                         [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) to[i] = source[i] < 0 ? T() : values[source[i]];
  });
  packed.fingerprint = fingerprint;
  packed.filled = true;
}

}  // namespace sparse_rnn
