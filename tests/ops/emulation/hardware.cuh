// The CUDA kernels on the host: what src/cgspn/ops/cuda/kernels/hardware.cuh defines, and the words of CUDA C++ that the
// kernels use. Every CUDA thread is a fiber; fibers change places at barriers and at warp-wide instructions only.
// Two freedoms of the hardware are swept to expose races: the order in which threads run, and when asynchronous copies
// land, which is at once or as late as their wait allows. Shared memory starts as NaN.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { u32 x; };
static Index threadIdx, blockIdx, blockDim;

namespace emulation {
struct Barrier {
  int expected = 0, arrived = 0;
  u32 generation = 0;
  void arrive() {
    if (++arrived == expected) arrived = 0, generation++;
  }
};
struct Warp {
  Barrier barrier;
  u32 slots[2][32][6];  // what the lanes hand to a warp-wide instruction
};
struct Block {
  std::vector<char> bytes;
  char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};
struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};
struct Copy { char* to; const char* from; int bytes; };
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool begun = false, done = false;
  u32 thread, block;
  int part;
  const Barrier* waits_for = nullptr;
  u32 seen = 0, cluster_seen = 0, turn = 0;
  std::vector<std::vector<Copy>> groups{1};
};
static Cluster* cluster;
static Fiber* fiber;
static jmp_buf scheduler;
static bool eager;
static void (*body)();

inline Block& block() { return cluster->blocks[fiber->part]; }
inline void wait(const Barrier& barrier, u32 seen) {
  if (barrier.generation != seen) return;
  fiber->waits_for = &barrier, fiber->seen = seen;
  if (!_setjmp(fiber->at)) _longjmp(scheduler, 1);
}
inline void meet(Barrier& barrier) {
  u32 seen = barrier.generation;
  barrier.arrive();
  wait(barrier, seen);
}
static void enter() {
  body();
  fiber->done = true;
  _longjmp(scheduler, 1);
}
inline void land(std::vector<Copy>& group) {
  for (const Copy& c : group) memcpy(c.to, c.from, c.bytes);
  group.clear();
}
// order: 0 threads first to last, 1 last to first, above that shuffled by this seed. False where all wait for ever.
static bool run(int grid, int threads, int parts, i64 shared, int order) {
  const int lanes = 32, stack = 128 << 10;
  std::vector<char> stacks((size_t)parts * threads * stack);
  for (int first = 0; first < grid; first += parts) {
    Cluster here;
    here.barrier.expected = parts * threads;
    here.blocks.resize(parts);
    for (Block& b : here.blocks) {
      b.bytes.assign(shared + 16, (char)0xff);
      b.shared = (char*)(((u64)b.bytes.data() + 15) & ~15ull);
      b.barrier.expected = threads;
      b.warps.resize(threads / lanes);
      for (Warp& w : b.warps) w.barrier.expected = lanes;
    }
    cluster = &here;
    std::vector<Fiber> fibers(parts * threads);
    std::vector<int> turns(fibers.size());
    for (int n = 0; n < (int)fibers.size(); n++) {
      fibers[n].thread = n % threads, fibers[n].part = n / threads, fibers[n].block = first + n / threads;
      getcontext(&fibers[n].context);
      fibers[n].context.uc_stack.ss_sp = stacks.data() + (size_t)n * stack;
      fibers[n].context.uc_stack.ss_size = stack;
      makecontext(&fibers[n].context, enter, 0);
      turns[n] = order == 1 ? (int)fibers.size() - 1 - n : n;
    }
    u64 random = 0x9e3779b97f4a7c15ull * (order + 1);
    volatile int left = (int)fibers.size();
    while (left) {
      volatile bool moved = false;
      if (order > 1)
        for (int n = (int)turns.size() - 1; n > 0; n--) {
          random = random * 6364136223846793005ull + 1442695040888963407ull;
          std::swap(turns[n], turns[(random >> 33) % (n + 1)]);
        }
      for (volatile int n = 0; n < (int)turns.size(); n = n + 1) {
        fiber = &fibers[turns[n]];
        if (fiber->done || (fiber->waits_for && fiber->waits_for->generation == fiber->seen)) continue;
        fiber->waits_for = nullptr;
        moved = true;
        threadIdx.x = fiber->thread, blockIdx.x = fiber->block, blockDim.x = threads;
        if (!_setjmp(scheduler)) {
          if (fiber->begun) _longjmp(fiber->at, 1);
          fiber->begun = true;
          setcontext(&fiber->context);
        }
        if (fiber->done) left = left - 1;
      }
      if (!moved) return false;
    }
  }
  return true;
}
template <class... Types, size_t... N>
void call(void (*kernel)(Types...), void** values, std::index_sequence<N...>) {
  kernel(*(std::remove_const_t<Types>*)values[N]...);
}
template <class... Types>
void call(void (*kernel)(Types...), void** values) {
  call(kernel, values, std::index_sequence_for<Types...>());
}
template <bool BFLOAT>
inline float widen(u32 bits) {
  if constexpr (BFLOAT) {
    u32 word = bits << 16;
    float f;
    memcpy(&f, &word, 4);
    return f;
  } else {
    _Float16 h;
    unsigned short s = (unsigned short)bits;
    memcpy(&h, &s, 2);
    return (float)h;
  }
}
template <bool BFLOAT>
inline u32 narrow(float f) {
  if constexpr (BFLOAT) {
    u32 word;
    memcpy(&word, &f, 4);
    if (f != f) return 0x7fff;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  } else {
    _Float16 h = (_Float16)f;
    unsigned short s;
    memcpy(&s, &h, 2);
    return s;
  }
}
}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block().barrier); }
inline void __syncwarp() { emulation::meet(emulation::block().warps[threadIdx.x / 32].barrier); }
using std::min;
inline float __uint_as_float(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline u32 __float_as_uint(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

inline char* shared_memory() { return emulation::block().shared; }
template <int N>
void copy_async(void* to, const char* from) {
  if (((u64)to | (u64)from) % N) abort();  // the hardware traps
  emulation::Copy copy{(char*)to, from, N};
  if (emulation::eager)
    memcpy(to, from, N);
  else
    emulation::fiber->groups.back().push_back(copy);
}
template <int N>
void copy_around(void* to, const char* from) { copy_async<N>(to, from); }
template <int N>
void load_around(u32 (&w)[N], const char* p) {
  if ((u64)p % (4 * N)) abort();
  memcpy(w, p, 4 * N);
}
inline void copies_commit() { emulation::fiber->groups.emplace_back(); }
template <int N>
void copies_wait() {  // the last group is the one that is still open
  auto& groups = emulation::fiber->groups;
  while ((int)groups.size() - 1 > N) emulation::land(groups.front()), groups.erase(groups.begin());
}
inline void cluster_arrive() {
  emulation::fiber->cluster_seen = emulation::cluster->barrier.generation;
  emulation::cluster->barrier.arrive();
}
inline void cluster_wait() { emulation::wait(emulation::cluster->barrier, emulation::fiber->cluster_seen); }
inline void store_remote(float* here, int part, float value) {
  *(float*)(emulation::cluster->blocks[part].shared + ((char*)here - shared_memory())) = value;
}
inline float reciprocal(float x) { return 1.f / x; }
inline float power_of_two(float x) { return std::exp2(x); }
inline float least(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
inline float half_to_float(u32 bits) { return emulation::widen<false>(bits & 0xffff); }
template <bool BFLOAT>
u32 pack_pair(float low, float high) { return emulation::narrow<BFLOAT>(high) << 16 | emulation::narrow<BFLOAT>(low); }
template <bool BFLOAT>
void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float* to) {
  emulation::Warp& warp = emulation::block().warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32(&slots)[32][6] = warp.slots[emulation::fiber->turn++ % 2];
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(slots[lane], mine, sizeof mine);
  emulation::meet(warp.barrier);
  auto half = [](u32 word, int high) { return emulation::widen<BFLOAT>(high ? word >> 16 : word & 0xffff); };
  for (int n = 0; n < 4; n++) {
    const int column = 2 * t + n % 2;
    c[n] = to[n];
    for (int k = 0; k < 16; k++)
      c[n] += half(slots[4 * g + k % 8 / 2][n / 2 + k / 8 * 2], k & 1) *
              half(slots[4 * column + k % 8 / 2][4 + k / 8], k & 1);
  }
}

#define EMULATE(kernel)                                                                                       \
  extern "C" int emulate(int grid, int threads, int parts, i64 shared, void** values, int order, int eager) { \
    static void** arguments;                                                                                  \
    arguments = values;                                                                                       \
    emulation::eager = eager;                                                                                 \
    emulation::body = [] { emulation::call(kernel, arguments); };                                             \
    return emulation::run(grid, threads, parts, shared, order);                                               \
  }
