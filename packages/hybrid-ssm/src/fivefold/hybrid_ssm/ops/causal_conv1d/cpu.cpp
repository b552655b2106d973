// Causal convolution of each channel by itself, some channels at a time over all tokens, so that
// the rows that taps meet again stay in the first cache.
//
// Legend: B batch, S tokens, K channels, W taps.

#include "fivefold.h"

namespace {

using namespace fivefold;

// Channels of a block.
constexpr int64_t kBlock = 512;

struct Shape {
  int64_t batch, tokens, channels, taps;

  int64_t kept() const { return taps - 1; }
  int64_t blocks() const { return (channels + (kBlock - 1)) / kBlock; }
};

template <class P>
inline P silu_slope(P y) {
  const P logistic = sigmoid(y);
  return logistic * (1 + y * (1 - logistic));
}

// Some channels of one sequence.
template <class T>
struct Block {
  const Shape& shape;
  const T* x;              // its first token, tokens `step` apart
  int64_t step;
  const T* initial;        // (W - 1, K) or null
  const int32_t* documents;  // (S) or null
  int64_t first, count;    // channels

  Block(const Shape& shape, const T* xs, int64_t x_sequence, int64_t x_token, const T* initials,
        const int32_t* all_documents, int64_t task)
      : shape(shape), step(x_token) {
    const int64_t sequence = task / shape.blocks();
    first = task % shape.blocks() * kBlock;
    count = std::min(kBlock, shape.channels - first);
    x = xs + (sequence * x_sequence + first);
    initial = nullptr;
    if (initials != nullptr) initial = initials + (sequence * shape.kept() * shape.channels + first);
    documents = nullptr;
    if (all_documents != nullptr) documents = all_documents + sequence * shape.tokens;
  }

  int64_t document(int64_t token) const {
    return documents == nullptr ? 0 : documents[std::max<int64_t>(token, 0)];
  }

  // How many inputs before a token it sees.
  int64_t reach(int64_t token) const {
    const int64_t most = initial == nullptr ? std::min(shape.kept(), token) : shape.kept();
    if (documents == nullptr) return most;
    int64_t seen = 0;
    while (seen < most && document(token - (seen + 1)) == document(token)) ++seen;
    return seen;
  }

  // The input of a token, or one from before the first.
  const T* input(int64_t token) const {
    return token >= 0 ? x + token * step : initial + (token + shape.kept()) * shape.channels;
  }
};

// The taps [from, W) on the inputs from before - (W - 1 - from) to it, at channels i to i + count.
template <class T, class Count>
FIVEFOLD_INLINE inline Pack<Compute<T>> convolve(const T* const* inputs, const Compute<T>* weight,
                                                 const Compute<T>* bias, const Shape& shape,
                                                 int64_t from, int64_t i, Count count) {
  Pack<Compute<T>> sum = {};
  if (bias != nullptr) sum = load(bias + i, count);
  for (int64_t tap = from; tap < shape.taps; ++tap)
    sum += load(inputs[tap] + i, count) * load(weight + (tap * shape.channels + i), count);
  return sum;
}

// Pointers to what the taps meet at a token; returns the first that meets something.
template <class T>
inline int64_t meet(const Block<T>& block, int64_t token, const T** inputs) {
  const int64_t kept = block.shape.kept(), from = kept - block.reach(token);
  for (int64_t tap = from; tap < block.shape.taps; ++tap)
    inputs[tap] = block.input(token - (kept - tap));
  return from;
}

template <class T>
void forward(const Block<T>& block, const Compute<T>* weight, const Compute<T>* bias, bool silu,
             T* y) {
  using C = Compute<T>;
  const Shape& shape = block.shape;
  std::vector<const T*> inputs(shape.taps);
  for (int64_t token = 0; token < shape.tokens; ++token, y += shape.channels) {
    const int64_t from = meet(block, token, inputs.data());
    each_pack<C>(block.count, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      const Pack<C> sum = convolve(inputs.data(), weight, bias, shape, from, i, count);
      store(y + i, silu ? sum * sigmoid(sum) : sum, count);
    });
  }
}

// The last W - 1 inputs, those of the last token's document; what is not seen is zero.
template <class T>
void keep(const Block<T>& block, T* final_state) {
  const Shape& shape = block.shape;
  for (int64_t i = 0; i < shape.kept(); ++i) {
    const int64_t token = shape.tokens - shape.kept() + i;
    T* to = final_state + i * shape.channels;
    const bool there = token >= 0 || block.initial != nullptr;
    if (there && (shape.tokens == 0 || block.document(token) == block.document(shape.tokens - 1)))
      std::copy_n(block.input(token), block.count, to);
    else
      std::memset(to, 0, block.count * sizeof(T));
  }
}

template <class T>
struct Backward {
  using C = Compute<T>;
  const Block<T>& block;
  const Shape& shape;
  const C *weight, *bias;
  bool silu;
  const T* dy;  // its first token, tokens `dy_step` apart
  int64_t dy_step;
  const T* dfinal;  // (W - 1, K) or null
  T *dx, *dinitial;  // (S, K); (W - 1, K) or null
  C *dweight, *dbias;  // (W, K), (K)
  std::vector<Pack<C>> ring;  // gradients before the activation of the last W tokens
  std::vector<const T*> inputs;

  void run() {
    ring.resize(shape.taps * (kBlock / kLanes<C>));
    inputs.resize(shape.taps);
    for (int64_t tap = 0; tap < shape.taps; ++tap)
      std::fill_n(dweight + tap * shape.channels, block.count, C(0));
    std::fill_n(dbias, block.count, C(0));
    // An input is done when the last token that may see it is.
    for (int64_t token = 0; token < shape.tokens + shape.kept(); ++token) {
      if (token < shape.tokens) enter(token);
      write(token - shape.kept());
    }
  }

  C* before(int64_t token) {
    return reinterpret_cast<C*>(ring.data()) + token % shape.taps * kBlock;
  }

  void enter(int64_t token) {
    const int64_t from = meet(block, token, inputs.data());
    const T* dys = dy + token * dy_step;
    C* to = before(token);
    each_pack<C>(block.count, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      Pack<C> d = load(dys + i, count);
      if (silu) d *= silu_slope(convolve(inputs.data(), weight, bias, shape, from, i, count));
      store(to + i, d);
      store(dbias + i, load(dbias + i, count) + d, count);
      for (int64_t tap = from; tap < shape.taps; ++tap) {
        C* sums = dweight + (tap * shape.channels + i);
        store(sums, load(sums, count) + d * load(inputs[tap] + i, count), count);
      }
    });
  }

  // The gradient of the input of a token, or of one from before the first.
  void write(int64_t token) {
    if (token < 0 && dinitial == nullptr) return;
    T* to = token >= 0 ? dx + token * shape.channels
                       : dinitial + (token + shape.kept()) * shape.channels;
    const int64_t end = seen_until(token);
    const T* kept = nullptr;
    const int64_t row = token - (shape.tokens - shape.kept());
    if (dfinal != nullptr && row >= 0 &&
        (shape.tokens == 0 || block.document(token) == block.document(shape.tokens - 1)))
      kept = dfinal + row * shape.channels;
    each_pack<C>(block.count, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      Pack<C> sum = {};
      if (kept != nullptr) sum = load(kept + i, count);
      for (int64_t user = std::max<int64_t>(token, 0); user < end; ++user) {
        const int64_t tap = shape.kept() - (user - token);
        sum += load(before(user) + i) * load(weight + (tap * shape.channels + i), count);
      }
      store(to + i, sum, count);
    });
  }

  // The end of the tokens that see an input.
  int64_t seen_until(int64_t token) const {
    const int64_t most = std::min(shape.tokens, token + shape.taps);
    int64_t end = std::max<int64_t>(token, 0);
    while (end < most && block.document(end) == block.document(token)) ++end;
    return end;
  }
};

}  // namespace

// x, dy: (B, S, K) with strides of sequences and tokens; weight: (W, K) and bias: (K) or null in
// the dtype that is computed in; initial: (B, W - 1, K) or null; documents: (B, S) or null; y:
// (B, S, K) and final_state: (B, W - 1, K), without gaps.
FIVEFOLD_API void causal_conv1d_forward(int64_t type, int64_t batch, int64_t tokens,
                                        int64_t channels, int64_t taps, const void* x,
                                        int64_t x_sequence, int64_t x_token, const void* weight,
                                        const void* bias, const void* initial,
                                        const void* documents, int64_t silu, void* y,
                                        void* final_state, int64_t num_threads) {
  const Shape shape = {batch, tokens, channels, taps};
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const auto blocks = [&](int64_t from, int64_t to, int64_t) {
      for (int64_t task = from; task < to; ++task) {
        const Block<T> block(shape, static_cast<const T*>(x), x_sequence, x_token,
                             static_cast<const T*>(initial),
                             static_cast<const int32_t*>(documents), task);
        const int64_t sequence = task / shape.blocks();
        const auto* biases = static_cast<const Compute<T>*>(bias);
        forward(block, static_cast<const Compute<T>*>(weight) + block.first,
                bias == nullptr ? nullptr : biases + block.first, silu,
                static_cast<T*>(y) + (sequence * tokens * channels + block.first));
        keep(block, static_cast<T*>(final_state) +
                        (sequence * shape.kept() * channels + block.first));
      }
    };
    parallel_for(0, batch * shape.blocks(), 1, num_threads, blocks);
  });
}

// As above; dfinal and dinitial may be null; dweight: (B, W, K), dbias: (B, K), in the dtype that is
// computed in.
FIVEFOLD_API void causal_conv1d_backward(int64_t type, int64_t batch, int64_t tokens,
                                         int64_t channels, int64_t taps, const void* dy,
                                         int64_t dy_sequence, int64_t dy_token, const void* dfinal,
                                         const void* x, int64_t x_sequence, int64_t x_token,
                                         const void* weight, const void* bias, const void* initial,
                                         const void* documents, int64_t silu, void* dx,
                                         void* dweight, void* dbias, void* dinitial,
                                         int64_t num_threads) {
  const Shape shape = {batch, tokens, channels, taps};
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const auto blocks = [&](int64_t from, int64_t to, int64_t) {
      for (int64_t task = from; task < to; ++task) {
        const Block<T> block(shape, static_cast<const T*>(x), x_sequence, x_token,
                             static_cast<const T*>(initial),
                             static_cast<const int32_t*>(documents), task);
        const int64_t sequence = task / shape.blocks(), first = block.first;
        const int64_t state = sequence * shape.kept() * channels + first;
        Backward<T>{block,
                    shape,
                    static_cast<const C*>(weight) + first,
                    bias == nullptr ? nullptr : static_cast<const C*>(bias) + first,
                    silu != 0,
                    static_cast<const T*>(dy) + (sequence * dy_sequence + first),
                    dy_token,
                    dfinal == nullptr ? nullptr : static_cast<const T*>(dfinal) + state,
                    static_cast<T*>(dx) + (sequence * tokens * channels + first),
                    dinitial == nullptr ? nullptr : static_cast<T*>(dinitial) + state,
                    static_cast<C*>(dweight) + (sequence * taps * channels + first),
                    static_cast<C*>(dbias) + (sequence * channels + first),
                    {},
                    {}}
            .run();
      }
    };
    parallel_for(0, batch * shape.blocks(), 1, num_threads, blocks);
  });
}
