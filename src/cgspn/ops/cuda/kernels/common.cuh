// Shared by all kernels: element types, copies, the normalisation, the merge of directions.
// Compiled by NVRTC without any header. Macros set by plan.py:
//   DTYPE      0 float32, 1 float16, 2 bfloat16
//   VEC        channels per thread (one copy moves VEC * sizeof(element): 2, 4, 8 or 16 bytes)
//   STAGES     lines in flight: in registers (forward), or in shared memory with the current one (backward)
//   THREADS    upper bound of the block size
//   NORMALISE  1: propagate_2d (sigmoid, normalised, gated); 0: line_scan (given weights, no gate)
//   SHARE      1: the VEC channels of a thread are a parameter group
//   FORGET     1: a forget gate scales the previous line
//   MEAN       1: outputs and saved states are h / n, where n is the same scan over ones, one per parameter group
//   MASKED     1: a mask is given
//   SPLIT      blocks per line, which form a cluster (sm_90 and later)
//   HALO       positions on either side of its own that such a block also scans. One fewer of them is correct after
//              every line, so blocks exchange states every HALO lines; 0 if SPLIT is 1
//   MERGE      1: merge.cu will read the planes of the directions; 0: outputs are final
//   NARROW     1: a block's run of channels is short, and the memory next to it is read a line later or by other
//              blocks, so caches should keep the 128 bytes that one access fetches
// Shape letters as in reference.py. All strides are in bytes and 64 bits wide.

#include "hardware.cuh"

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif
#define ELEMENT (DTYPE == 0 ? 4 : 2)
constexpr int BYTES = VEC * ELEMENT;
constexpr int WORDS = BYTES < 4 ? 1 : BYTES / 4;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float EPSILON = 1e-7f;
constexpr float SMALLEST = 1e-6f;  // n is clamped below at this

struct View {
  char* p;
  i64 b, h, w, d, k, c;  // strides of batch, row, column, direction, neighbour, channel
};

struct Shape {
  int B, H, W, C, D;
  int codes[4];    // 0 down, 1 up, 2 right, 3 left
  int vectors;     // C / VEC
  int lanes;       // vectors per block
  int groups;      // blocks along the channels
  int rows;        // positions per block; lanes * rows threads are active
  int own;         // positions of a line that a block writes; rows cover them and the halo
  int longest;     // the longer of H and W
  int chunk;       // lines between restarts; 0: never
};

struct __align__(BYTES < 4 ? 4 : BYTES) Vec {
  u32 w[WORDS];
};

// A thread's values in one parameter map: one per channel, or one for all its channels.
struct Single {
  u32 w;
};
template <bool FIRST, class A, class B>
struct Either {
  using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
};
using Parameter = Either<SHARE, Single, Vec>::type;
constexpr int SETS = SHARE ? 1 : VEC;
constexpr int COUNTED = VEC + MEAN * SETS;  // scans per thread: its channels, and n of their groups

// The line order and axes of a direction.
struct Way {
  int lines, positions;
  bool vertical, backwards;
  template <class S>
  __device__ void take(const S& s, int d) {
    const int code = s.codes[d];
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

// The position of a block and thread, and the direction.
struct Walk : Way {
  int b, d, lane, j, vec, slot, part, row;
  bool busy;
  __device__ explicit Walk(const Shape& s) {
    u32 block = blockIdx.x;
    part = block % SPLIT;
    block /= SPLIT;
    d = block % s.D;
    block /= s.D;
    b = block / s.groups;
    take(s, d);
    slot = threadIdx.x;
    lane = slot % s.lanes;
    row = slot / s.lanes;
    j = part * s.own - HALO + row;
    vec = (block % s.groups) * s.lanes + lane;
    busy = vec < s.vectors && row < s.rows;
  }
  // Whether this thread has a position, and whether the block owns it and writes its outputs.
  __device__ bool works(const Shape& s) const {
    return busy && j >= 0 && j < positions && row < s.own + 2 * HALO;
  }
  __device__ bool owns(const Shape& s) const {
    const int k = row - HALO;
    return SPLIT == 1 || (k >= 0 && k < s.own);
  }
  __device__ char* start(const View& v, int i) const { return at(v, i, (i64)vec * VEC); }
  __device__ char* start_parameter(const View& v, int i) const { return at(v, i, (i64)vec * SETS); }
  __device__ char* at(const View& v, int i, i64 channel) const {
    return v.p + b * v.b + d * v.d + (backwards ? lines - 1 - i : i) * line(v) + j * across(v) + channel * v.c;
  }
};

// Global to shared. Asynchronous, except for single 16-bit elements, which the hardware cannot copy that way.
__device__ __forceinline__ void copy_in(void* to, const char* from) {
  if constexpr (BYTES >= 4)
    NARROW ? copy_around<BYTES>(to, from) : copy_async<BYTES>(to, from);
  else
    *(unsigned short*)to = *(const unsigned short*)from;
}

// The type that one access moves.
using Short = Either<BYTES == 4, u32, unsigned short>::type;
using Word = Either<BYTES == 16, uint4, Either<BYTES == 8, uint2, Short>::type>::type;

__device__ __forceinline__ Vec vector_of(const Word& word) {
  Vec v;
  v.w[0] = 0;
  *(Word*)v.w = word;
  return v;
}

__device__ __forceinline__ Vec load(const void* p) { return vector_of(*(const Word*)p); }

__device__ __forceinline__ Vec load_narrow(const char* p) {
  Vec v;
  load_around(v.w, p);
  return v;
}

// Data that is read only once should be evicted first, so that caches keep x, which every direction reads. Not if the
// memory around it is read later.
__device__ __forceinline__ Vec load_once(const char* p) {
  if constexpr (BYTES < 4) return load(p);
  if constexpr (NARROW) return load_narrow(p);
  return vector_of(__ldcs((const Word*)p));
}

__device__ __forceinline__ Vec load_shared_by_directions(const char* p) {
  if constexpr (NARROW && BYTES >= 4) return load_narrow(p);
  return vector_of(__ldg((const Word*)p));
}

// Store data that is read again (a plane to be merged) or that fills only a part of a sector.
__device__ __forceinline__ void store_plane(char* p, const Vec& v) { *(Word*)p = *(const Word*)v.w; }

// Store data that is not read again soon.
__device__ __forceinline__ void store(char* p, const Vec& v) {
  if constexpr (NARROW || BYTES < 4) return store_plane(p, v);
  __stcs((Word*)p, *(const Word*)v.w);
}

// Channel k of a vector; k must be known at compile time after unrolling.
__device__ __forceinline__ float get(const Vec& v, int k) {
  if constexpr (DTYPE == 0) return __uint_as_float(v.w[k]);
  u32 word = v.w[k / 2];
  if constexpr (DTYPE == 2) return __uint_as_float(k & 1 ? word & 0xffff0000u : word << 16);
  return half_to_float(k & 1 ? word >> 16 : word & 0xffffu);
}

__device__ __forceinline__ float get(const Single& v, int) {
  if constexpr (DTYPE == 0) return __uint_as_float(v.w);
  if constexpr (DTYPE == 2) return __uint_as_float(v.w << 16);
  return half_to_float(v.w);
}

// The parameters of a position. Gates exist only in kernels that use them.
struct Parameters {
  Parameter lam, l0, l1, l2, u, keep;
};

// A parameter is read and written once. With SHARE it fills only a part of a sector, which caches should then keep.
__device__ __forceinline__ Parameter load_parameter(const char* p) {
  if constexpr (SHARE) {
    Single v;
    if constexpr (DTYPE == 0)
      v.w = *(const u32*)p;
    else
      v.w = *(const unsigned short*)p;
    return *(Parameter*)&v;
  } else {
    const Vec v = load_once(p);
    return *(Parameter*)&v;
  }
}

__device__ __forceinline__ Vec pack(const float* f) {
  Vec v;
  if constexpr (DTYPE == 0) {
#pragma unroll
    for (int k = 0; k < VEC; k++) v.w[k] = __float_as_uint(f[k]);
  } else {
#pragma unroll
    for (int k = 0; k < WORDS; k++) {
      float low = f[2 * k], high = VEC > 1 ? f[2 * k + (VEC > 1)] : 0.f;
      v.w[k] = pack_pair<DTYPE == 2>(low, high);
    }
  }
  return v;
}

__device__ __forceinline__ void store_parameter(char* p, const float* f) {
  if constexpr (!SHARE)
    store(p, pack(f));
  else if constexpr (DTYPE == 0)
    *(float*)p = *f;
  else
    *(unsigned short*)p = (unsigned short)pack_pair<DTYPE == 2>(*f, 0.f);
}

// The float32 state of a line in shared memory: N values per position, in planes of one access each, no bank conflicts.
template <int N = VEC>
__device__ __forceinline__ void state_put(float* line, int plane, int index, const float* f) {
  constexpr int QUAD = N < 4 ? N : 4;
#pragma unroll
  for (int q = 0; q < N / QUAD; q++) {
    float* at = line + (q * plane + index) * QUAD;
    if constexpr (QUAD == 4)
      *(float4*)at = *(const float4*)(f + 4 * q);
    else if constexpr (QUAD == 2)
      *(float2*)at = *(const float2*)f;
    else
      *at = *f;
  }
}

template <int N = VEC>
__device__ __forceinline__ void state_get(const float* line, int plane, int index, float* f) {
  constexpr int QUAD = N < 4 ? N : 4;
#pragma unroll
  for (int q = 0; q < N / QUAD; q++) {
    const float* at = line + (q * plane + index) * QUAD;
    if constexpr (QUAD == 4)
      *(float4*)(f + 4 * q) = *(const float4*)at;
    else if constexpr (QUAD == 2)
      *(float2*)f = *(const float2*)at;
    else
      *f = *at;
  }
}

// Exchange within a cluster, every HALO lines: a block writes its edge positions to the neighbour's halo. There are
// COUNT times up to VEC values, and two buffers, so that a block can write while its neighbour still reads.
template <int COUNT>
struct Mailbox {
  float* boxes;  // [2][2 sides][HALO][COUNT][lanes][VEC]
  int side, odd = 0;
  __device__ Mailbox(float* at, const Shape& s) : boxes(at), side(HALO * COUNT * s.lanes * VEC) {}
  __device__ float* at(const Shape& s, const Walk& walk, bool right, int k, int n) const {
    return boxes + (odd * 2 + right) * side + ((k * COUNT + n) * s.lanes + walk.lane) * VEC;
  }
  // Send the values `n` of this position to the neighbours that have it in their halo.
  template <int N = VEC>
  __device__ void put(const Shape& s, const Walk& walk, int n, const float* f) const {
    const int k = walk.row - HALO;
    if (walk.part > 0 && k < HALO) send<N>(at(s, walk, true, k, n), walk.part - 1, f);
    if (walk.part < SPLIT - 1 && k >= s.own - HALO)
      send<N>(at(s, walk, false, k - (s.own - HALO), n), walk.part + 1, f);
  }
  template <int N>
  __device__ static void send(float* here, int part, const float* f) {
#pragma unroll
    for (int c = 0; c < N; c++) store_remote(here + c, part, f[c]);
  }
  // Receive the values of this position, which another block owns.
  template <int N = VEC>
  __device__ void take(const Shape& s, const Walk& walk, int n, float* f) const {
    const int k = walk.row - HALO;
    const float* from = k < 0 ? at(s, walk, false, k + HALO, n) : at(s, walk, true, k - s.own, n);
#pragma unroll
    for (int c = 0; c < N; c++) f[c] = from[c];
  }
};

// exp(-a), clamped at exp(40) because the products below would overflow. NaN is kept.
__device__ __forceinline__ float exp_minus(float a) {
  return power_of_two(least(a * -LOG2E, 57.6f));
}

// The sigmoids of the existing neighbours, divided by their sum, with one reciprocal. With a = 1 + exp(-logit) per
// neighbour, s0 : s1 : s2 = a1 a2 : a0 a2 : a0 a1, and clamping the sum at EPSILON is a comparison with EPSILON a0 a1
// a2. The relative precision does not depend on how negative the logits are.
struct Weights {
  float w[3];
  float e[3];  // exp(-logit), 0 where there is no neighbour
  bool clamped;
  __device__ __forceinline__ Weights(float l0, float l1, float l2, u32 exists) {
    e[0] = exists & 1 ? exp_minus(l0) : 0.f;
    e[1] = exists & 2 ? exp_minus(l1) : 0.f;
    e[2] = exists & 4 ? exp_minus(l2) : 0.f;
    float a0 = 1.f + e[0], a1 = 1.f + e[1], a2 = 1.f + e[2];
    float pair = a1 * a2;
    float n0 = exists & 1 ? pair : 0.f, n1 = exists & 2 ? a0 * a2 : 0.f, n2 = exists & 4 ? a0 * a1 : 0.f;
    float sum = n0 + n1 + n2, floor = (EPSILON * a0) * pair;
    clamped = sum <= floor;
    float r = reciprocal(clamped ? floor : sum);
    w[0] = n0 * r;
    w[1] = n1 * r;
    w[2] = n2 * r;
  }
};

// Bits 0..2: whether the neighbours j-1, j, j+1 exist on the previous line; bit 3: the position itself is inside.
// `here` is the mask's byte at this position of line i.
__device__ __forceinline__ u32 surroundings(const Way& way, int j, int i, const char* here, i64 step, i64 across) {
  u32 bits = (j > 0 ? 1u : 0u) | 2u | (j + 1 < way.positions ? 4u : 0u) | 8u;
#if MASKED
  u32 inside = *here ? 8u : 0u;
  if (i > 0) {
    const char* before = here - step;
    if (bits & 1 && !before[-across]) bits &= ~1u;
    if (!before[0]) bits &= ~2u;
    if (bits & 4 && !before[across]) bits &= ~4u;
  }
  bits = inside ? bits : 0u;
#endif
  return bits;
}
