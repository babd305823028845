// The scan whose parameters are made on the chip: for every line, x [M, C] times the weights of lam, u and the logits,
// by tensor cores, in the threads that scan with them. Macros besides those of common.cuh (VEC = 8, DTYPE not 0):
//   DEPTH      channels of x, rounded up to 32
//   TILES      tiles of 16 positions a warp handles
//   ROW_WARPS  warps along a line
//   GROUPS     groups of 8 channels a block handles, each by warps of its own: 1, 2, 4 or 8
// A thread gets positions g and g + 8 of a tile and channels 2t, 2t + 1 of its group, for all five parameters alike
// (g = lane / 4, t = lane % 4: multiply_add in hardware.cuh). The order of channels inside a product is free, so that
// what a thread feeds the tensor core is runs of 16 bytes of x and of the weights, which are transposed nowhere.

#include "common.cuh"

constexpr int LINE = ROW_WARPS * TILES * 16;  // positions that a block has room for
constexpr int CHUNKS = DEPTH / 8;             // 16 bytes each, of a position of x
constexpr int STEPS = DEPTH / 32;
constexpr int PARAMETERS = 5;        // lam, u, the logits of j-1, j, j+1
constexpr bool KEEP = DEPTH <= 128;  // weights stay in registers for the whole scan; else in shared memory

struct ProjectedShape {
  int B, H, W, C, D;
  int codes[4];  // 0 down, 1 up, 2 right, 3 left
  int groups;    // C / 8
  int blocks;    // along the channels
};

// How a direction walks the grid.
struct Way {
  bool vertical, backwards;
  int lines, positions;
  __device__ Way(const ProjectedShape& s, int code) {
    vertical = code < 2;
    backwards = code & 1;
    lines = vertical ? s.H : s.W;
    positions = vertical ? s.W : s.H;
  }
  __device__ i64 line(const View& v) const { return vertical ? v.h : v.w; }
  __device__ i64 across(const View& v) const { return vertical ? v.w : v.h; }
  __device__ i64 step(const View& v) const { return backwards ? -line(v) : line(v); }
  __device__ char* start(const View& v, int b, int d, int i) const {
    return v.p + b * v.b + d * v.d + (backwards ? lines - 1 - i : i) * line(v);
  }
};

// Where a thread stands.
struct Seat {
  int n, part, lane, g, t;
  __device__ Seat() {
    const int warp = threadIdx.x / 32;
    n = warp % GROUPS, part = warp / GROUPS;
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  }
};

// Chunks of a position change places so that neither the 16-byte reads of products nor the 4-byte reads of single
// channels meet in a bank of shared memory.
__device__ __forceinline__ int place(int row, int chunk) {
  const int turn = CHUNKS % 8 == 0 ? (row & 1) << 2 | (row & 2) | (row & 4) >> 2 : row >> 1 & 3;
  return row * CHUNKS + (chunk ^ turn);
}
// The same for a line of the block's own channels only.
__device__ __forceinline__ int place_own(int row, int chunk) {
  return row * GROUPS + (chunk ^ (row / (8 / GROUPS) & (GROUPS - 1)));
}

// Begin to copy a line of x, all channels.
__device__ __forceinline__ void fetch_all(uint4* to, const char* from, i64 across, int positions, int groups) {
#pragma unroll
  for (int k = 0; k < (LINE * CHUNKS + THREADS - 1) / THREADS; k++) {
    const int n = threadIdx.x + k * THREADS, row = n / CHUNKS, chunk = n % CHUNKS;
    if (row < positions && row < LINE && chunk < groups)
      copy_async<16>(to + place(row, chunk), from + row * across + chunk * 16);
  }
}
// Begin to copy a line of the block's own channels, which start at `from`.
__device__ __forceinline__ void fetch_own(uint4* to, const char* from, i64 across, int positions, int groups) {
#pragma unroll
  for (int k = 0; k < (LINE * GROUPS + THREADS - 1) / THREADS; k++) {
    const int n = threadIdx.x + k * THREADS, row = n / GROUPS, chunk = n % GROUPS;
    if (row < positions && row < LINE && chunk < groups)
      copy_async<16>(to + place_own(row, chunk), from + row * across + chunk * 16);
  }
}

// Weights and biases of one direction and the group of a warp.
struct Projection {
  uint4 kept[KEEP ? PARAMETERS : 1][KEEP ? STEPS : 1];
  float bias[PARAMETERS][2];
  uint4* shared;

  __device__ __forceinline__ void load(const char* weight, const char* biases, int d, int group, int C, const Seat& seat,
                                       uint4* room) {
    shared = room;
#pragma unroll
    for (int f = 0; f < PARAMETERS; f++) {
      const i64 row = ((i64)d * PARAMETERS + f) * C + group * 8;
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int chunk = 4 * s + seat.t;
        uint4 words = {0, 0, 0, 0};
        if (chunk * 8 < C) words = __ldg((const uint4*)(weight + ((row + seat.g) * C + chunk * 8) * 2));
        if constexpr (KEEP)
          kept[f][s] = words;
        else if (seat.part == 0)
          shared[((seat.n * PARAMETERS + f) * STEPS + s) * 32 + seat.lane] = words;
      }
#pragma unroll
      for (int c = 0; c < 2; c++) bias[f][c] = 0.f;
      if (biases) {
        Vec pair;
        pair.w[0] = __ldg((const u32*)(biases + (row + 2 * seat.t) * 2));
        bias[f][0] = get(pair, 0), bias[f][1] = get(pair, 1);
      }
    }
  }

  // The parameters of a tile of 16 positions that starts at `row`, without their biases.
  template <bool GATE>
  __device__ __forceinline__ void make(float (&out)[PARAMETERS][4], const uint4* x, int row, const Seat& seat) const {
    const float zero[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const uint4 a = x[place(row + seat.g, 4 * s + seat.t)], b = x[place(row + seat.g + 8, 4 * s + seat.t)];
#pragma unroll
      for (int f = 0; f < PARAMETERS; f++) {
        if (f == 1 && !GATE) continue;
        uint4 w;
        if constexpr (KEEP)
          w = kept[f][s];
        else
          w = shared[((seat.n * PARAMETERS + f) * STEPS + s) * 32 + seat.lane];
        multiply_add<DTYPE == 2>(out[f], a.x, b.x, a.y, b.y, w.x, w.y, s == 0 ? zero : out[f]);
        multiply_add<DTYPE == 2>(out[f], a.z, b.z, a.w, b.w, w.z, w.w, out[f]);
      }
    }
  }
};
__device__ __forceinline__ u32 word_of(const uint4* line, int chunk, int t) { return ((const u32*)(line + chunk))[t]; }

__device__ __forceinline__ float half_of(u32 word, int k) {
  Vec v;
  v.w[0] = word;
  return get(v, k);
}

// As surroundings() in common.cuh: which neighbours exist, and whether position j of line i is inside (bit 3).
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
