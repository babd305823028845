// The scan with parameters computed on the chip: for every line, tensor cores multiply x [M, C] by the weights of lam, u
// and the logits, in the threads that use them. Macros besides those of common.cuh (VEC = 8, DTYPE not 0):
//   DEPTH      channels of x, rounded up to 32
//   TILES      tiles of 8 positions per warp
//   ROW_WARPS  warps along a line
//   GROUPS     groups of 16 channels per block, each with its own warps: 1, 2 or 4
// The left factor is the weights (16 channels of one parameter), the right one x (8 positions). So the data read for
// every line has the tensor core's register layout, and the weights are arranged only once. A thread gets positions
// 2t, 2t + 1 of a tile and channels 2g, 2g + 1 of its group, for all five parameters (g = lane / 4, t = lane % 4:
// multiply_add in hardware.cuh; rows 0..7 of the left factor are the even channels). The order of channels inside a
// product is free, so a thread reads runs of 16 bytes of x and of the weights, without any transposition.

#include "common.cuh"

constexpr int LINE = ROW_WARPS * TILES * 8;  // positions that fit in a block
constexpr int CHUNKS = DEPTH / 8;            // of 16 bytes, per position of x
constexpr int OWN = 2 * GROUPS;              // chunks that a block handles
constexpr int STATE = 20;                    // floats per position of the state: 16, plus 4 against bank conflicts
constexpr int STEPS = DEPTH / 32;
constexpr int PARAMETERS = 5;        // lam, u, the logits of j-1, j, j+1

struct ProjectedShape {
  int B, H, W, C, D;
  int codes[4];  // 0 down, 1 up, 2 right, 3 left
  int chunks;    // C / 8
  int blocks;    // along the channels
};

// Chunks of a position are permuted so that neither the 16-byte reads of products nor the 4-byte reads of single
// channels cause bank conflicts.
__device__ __forceinline__ int place(int row, int chunk) {
  const int turn = CHUNKS % 8 == 0 ? (row & 1) << 2 | (row & 2) | (row & 4) >> 2 : row >> 1 & 3;
  return row * CHUNKS + (chunk ^ turn);
}
// The same for lines with only the block's own channels.
__device__ __forceinline__ int place_own(int row, int chunk) {
  return row * OWN + (chunk ^ (row / (8 / OWN) & (OWN - 1)));
}

// The place of a thread. Addresses inside a line in shared memory are computed once. Tiles begin at multiples of 8
// positions, which do not change the order of chunks, so that a tile is a compile-time offset.
struct Seat {
  int n, part, lane, g, t;
  int row;          // its first position in the first tile of its warp
  int chunk;        // its two channels among the block's own
  int feed[STEPS];  // chunks, of all channels, that it passes to the tensor core
  int all[2];       // its positions and channels in a line of all channels, in words
  int own[2];       // and in a line of the block's own channels
  int state;        // and in a line of the state, in floats

  // `first`: the first chunk of the block's own channels.
  __device__ explicit Seat(int first) {
    const int warp = threadIdx.x / 32;
    n = warp % GROUPS, part = warp / GROUPS;
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int begin = part * TILES * 8;
    row = begin + 2 * t;
    chunk = 2 * n + g / 4;
#pragma unroll
    for (int s = 0; s < STEPS; s++) feed[s] = place(begin + g, 4 * s + t);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      all[r] = place(row + r, first + chunk) * 4 + g % 4;
      own[r] = place_own(row + r, chunk) * 4 + g % 4;
    }
    state = (n * (LINE + 2) + row) * STATE + 2 * g;
  }
};

// Start copying a line: `chunks` chunks per position from address `from`.
__device__ __forceinline__ void fetch_line(uint4* to, const char* from, i64 across, int positions, int chunks) {
#pragma unroll
  for (int k = 0; k < (LINE * CHUNKS + THREADS - 1) / THREADS; k++) {
    const int n = threadIdx.x + k * THREADS, row = n / CHUNKS, chunk = n % CHUNKS;
    if (row < positions && row < LINE && chunk < chunks)
      copy_async<16>(to + place(row, chunk), from + row * across + chunk * 16);
  }
}

// Weights and biases of one direction and the group of a warp.
struct Projection {
  uint4 kept[PARAMETERS][STEPS][2];
  float bias[PARAMETERS][2];
  uint4* shared;  // [GROUPS][PARAMETERS][STEPS][2][32]

  __device__ __forceinline__ Projection(const Seat& seat, uint4* room)
      : shared(room + seat.n * PARAMETERS * STEPS * 64 + seat.lane) {}
  // `channel`: the first channel of the group.
  __device__ __forceinline__ void load(const char* weight, const char* biases, int d, int channel, int C,
                                       const Seat& seat) {
    channel += 2 * seat.g;
#pragma unroll
    for (int f = 0; f < PARAMETERS; f++) {
      const i64 row = ((i64)d * PARAMETERS + f) * C + channel;
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int from = (4 * s + seat.t) * 8;
        uint4 even = {0, 0, 0, 0}, odd = {0, 0, 0, 0};
        if (from < C && channel < C) {
          even = __ldg((const uint4*)(weight + (row * C + from) * 2));
          odd = __ldg((const uint4*)(weight + ((row + 1) * C + from) * 2));
        }
        const uint4 low = {even.x, odd.x, even.y, odd.y}, high = {even.z, odd.z, even.w, odd.w};
        if (seat.part == 0) shared[(f * STEPS + s) * 64] = low, shared[(f * STEPS + s) * 64 + 32] = high;
      }
      bias[f][0] = bias[f][1] = 0.f;
      if (biases && channel < C) {
        Vec pair;
        pair.w[0] = __ldg((const u32*)(biases + row * 2));
        bias[f][0] = get(pair, 0), bias[f][1] = get(pair, 1);
      }
    }
  }

  // Called after a barrier by all warps, even those without channels. Read as vectors, the weights have the tensor
  // core's register layout; otherwise the compiler would pack the halves again for every product.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int f = 0; f < PARAMETERS; f++)
#pragma unroll
      for (int s = 0; s < STEPS; s++)
        kept[f][s][0] = shared[(f * STEPS + s) * 64], kept[f][s][1] = shared[(f * STEPS + s) * 64 + 32];
  }

  // The parameters of the warp's tile T without biases; [2 c + r] is channel c of position r of this thread.
  __device__ __forceinline__ void make(float (&out)[PARAMETERS][4], const uint4* x, int T, const Seat& seat) const {
    const float zero[4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const uint4 v = x[seat.feed[s] + T * 8 * CHUNKS];
#pragma unroll
      for (int f = 0; f < PARAMETERS; f++) {
        const uint4 low = kept[f][s][0], high = kept[f][s][1];
        multiply_add<DTYPE == 2>(out[f], low.x, low.y, low.z, low.w, v.x, v.y, s == 0 ? zero : out[f]);
        multiply_add<DTYPE == 2>(out[f], high.x, high.y, high.z, high.w, v.z, v.w, out[f]);
      }
    }
  }
};

__device__ __forceinline__ float half_of(u32 word, int k) {
  Vec v;
  v.w[0] = word;
  return get(v, k);
}

// Like surroundings() in common.cuh: which neighbours exist, and whether position j of line i is inside (bit 3).
__device__ __forceinline__ u32 around(const Way& way, int j, int i, const char* here, i64 step, i64 across) {
  if (j >= way.positions) return 0;
  u32 bits = (j > 0 ? 1u : 0u) | 2u | (j + 1 < way.positions ? 4u : 0u) | 8u;
#if MASKED
  here += j * across;
  if (i > 0) {
    const char* before = here - step;
    if (bits & 1 && !before[-across]) bits &= ~1u;
    if (!before[0]) bits &= ~2u;
    if (bits & 4 && !before[across]) bits &= ~4u;
  }
  if (!*here) bits = 0;
#endif
  return bits;
}
