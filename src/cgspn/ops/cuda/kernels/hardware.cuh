// Instructions without a C++ equivalent, one function each. The kernels have no other inline assembly, so that tests
// can replace this file by tests/ops/emulation/hardware.cuh and run the kernels on the CPU.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// Copy N bytes, global to shared, asynchronously. The hardware takes 4, 8 or 16; 16 bypass the L1.
template <int N>
__device__ __forceinline__ void copy_async(void* to, const char* from) {
  u32 s = (u32)__cvta_generic_to_shared(to);
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(s), "l"(from), "n"(N) : "memory");
}
// Load words, or copy them to shared memory, and have the L2 fetch the 128 bytes around them.
__device__ __forceinline__ void load_around(u32 (&w)[4], const char* p) {
  asm volatile("ld.global.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p) : "memory");
}
__device__ __forceinline__ void load_around(u32 (&w)[2], const char* p) {
  asm volatile("ld.global.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p) : "memory");
}
__device__ __forceinline__ void load_around(u32 (&w)[1], const char* p) {
  asm volatile("ld.global.L2::128B.u32 %0, [%1];" : "=r"(w[0]) : "l"(p) : "memory");
}
template <int N>
__device__ __forceinline__ void copy_around(void* to, const char* from) {
  u32 s = (u32)__cvta_generic_to_shared(to);
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(s), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(s), "l"(from), "n"(N) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copies_wait() {  // until at most N groups of this thread are in flight
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The barrier of a cluster in two halves: writes before a thread's arrival are visible to all threads after their wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Store to the address of `here` in the shared memory of block `part` of the cluster.
__device__ __forceinline__ void store_remote(float* here, int part, float value) {
  u32 mine = (u32)__cvta_generic_to_shared(here), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(part));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float least(float a, float b) {  // NaN if either is
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float half_to_float(u32 bits) {
  float f;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(bits));
  return f;
}
template <bool BFLOAT>
__device__ __forceinline__ u32 pack_pair(float low, float high) {  // two 16-bit floats in a word
  u32 word;
  if constexpr (BFLOAT)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// c = to + a b on the warp's tensor core: a is 16 x 16, b 16 x 8, c 16 x 8. With g = lane / 4 and t = lane % 4:
// a0 row g, columns 2t, 2t+1; a1 row g+8; a2 as a0, 8 columns on; a3 as a1, 8 columns on; b0 rows 2t, 2t+1 of column g;
// b1 8 rows on; c0, c1 row g, columns 2t, 2t+1; c2, c3 row g+8.
template <bool BFLOAT>
__device__ __forceinline__ void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1,
                                             const float* to) {
  if constexpr (BFLOAT)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]), "f"(to[2]), "f"(to[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]), "f"(to[2]), "f"(to[3]));
}
