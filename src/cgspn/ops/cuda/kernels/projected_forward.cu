// The projected scan. A block handles GROUPS x 16 channels of an image, for one direction.
// There is one barrier per line: data written before it (state, output, copies of x) is read after it. Each is double
// buffered, so that reading and writing overlap.

#include "projected.cuh"

struct ProjectedForwardArguments {
  View x, weight, bias, mask, y;
  ProjectedShape s;
};

constexpr int STORES = (LINE * OWN + THREADS - 1) / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    projected_forward(const __grid_constant__ ProjectedForwardArguments a) {
  const ProjectedShape& s = a.s;
  u32 block = blockIdx.x;
  const int d = block % s.D;
  block /= s.D;
  const int first = block % s.blocks * OWN, b = block / s.blocks;  // chunk of channels, image
  const int own = min(OWN, s.chunks - first);
  const Seat seat(first);
  const bool works = 2 * seat.n < own;

  uint4* const lines_x = (uint4*)shared_memory();        // [STAGES][LINE][CHUNKS]
  uint4* const outs = lines_x + STAGES * LINE * CHUNKS;  // [2][LINE][OWN]
  float* const states = (float*)(outs + 2 * LINE * OWN);  // [2][GROUPS][LINE + 2][STATE]: an empty position at each end
  uint4* const room = (uint4*)(states + 2 * GROUPS * (LINE + 2) * STATE);
  for (int k = threadIdx.x; k < STAGES * LINE * CHUNKS; k += THREADS) lines_x[k] = {0, 0, 0, 0};

  Projection projection(seat, room);
  Way way;
  way.take(s, d);
  for (int k = threadIdx.x; k < 2 * GROUPS * (LINE + 2) * STATE; k += THREADS) states[k] = 0.f;
  if (works) projection.load(a.weight.p, a.bias.p, d, (first + 2 * seat.n) * 8, s.C, seat);
  __syncthreads();
  projection.keep();

  float exponent[3][2];  // the logits' biases in the exponents of the sigmoids
#pragma unroll
  for (int f = 0; f < 3; f++)
#pragma unroll
    for (int c = 0; c < 2; c++) exponent[f][c] = projection.bias[2 + f][c] * -LOG2E;
  const char* x = way.start(a.x, b, d, 0);
  const char* mask = way.start(a.mask, b, d, 0);
  char* y = way.start(a.y, b, d, 0) + first * 16;
  const i64 x_step = way.step(a.x), y_step = way.step(a.y), mask_step = way.step(a.mask);
  const i64 x_across = way.across(a.x), y_across = way.across(a.y), mask_across = way.across(a.mask);
#pragma unroll
  for (int n = 0; n < STAGES - 1; n++, x += x_step) {
    if (n < way.lines) fetch_line(lines_x + n * LINE * CHUNKS, x, x_across, way.positions, s.chunks);
    copies_commit();
  }

  auto flush = [&](const uint4* out, char* to) {
#pragma unroll
    for (int k = 0; k < STORES; k++) {
      const int n = threadIdx.x + k * THREADS, row = n / OWN, chunk = n % OWN;
      if (row < way.positions && row < LINE && chunk < own)
        store_plane(to + row * y_across + chunk * 16, load(out + place_own(row, chunk)));
    }
  };

  float h[TILES][4];
#pragma unroll
  for (int T = 0; T < TILES; T++)
#pragma unroll
    for (int e = 0; e < 4; e++) h[T][e] = 0.f;
  int stage = 0, filling = STAGES - 1;
  for (int i = 0; i < way.lines; i++) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    if (i + STAGES - 1 < way.lines) fetch_line(lines_x + filling * LINE * CHUNKS, x, x_across, way.positions, s.chunks);
    copies_commit();
    x += x_step;
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    if (i > 0) {
      flush(outs + (i & 1 ? 0 : LINE * OWN), y);
      y += y_step;
    }
    const uint4* line_x = lines_x + stage * LINE * CHUNKS;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    u32* out = (u32*)(outs + (i & 1 ? LINE * OWN : 0));
    float* now = states + (i & 1) * GROUPS * (LINE + 2) * STATE + seat.state;
    const float* before = states + ((i & 1) ^ 1) * GROUPS * (LINE + 2) * STATE + seat.state;
    __syncwarp();  // lanes may have diverged in their copies; products need them converged
#pragma unroll
    for (int T = 0; T < TILES; T++) {
      const int j = seat.row + T * 8;
      if (!works || j - 2 * seat.t >= way.positions) continue;
      float made[PARAMETERS][4];
      projection.make(made, line_x, T, seat);
      const float2 outer[2] = {*(const float2*)(before + T * 8 * STATE), *(const float2*)(before + (T * 8 + 3) * STATE)};
      const float was[4] = {h[T][0], h[T][1], h[T][2], h[T][3]};
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const u32 bits = around(way, j + r, i, mask, mask_step, mask_across);
        const float e0 = bits & 1 ? 1.f : 0.f, e1 = bits & 2 ? 1.f : 0.f, e2 = bits & 4 ? 1.f : 0.f;
        const u32 vx = ((const u32*)line_x)[seat.all[r] + T * 32 * CHUNKS];
        float gated[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int e = 2 * c + r;
          // As Weights in common.cuh: sigmoids divided by their sum with one reciprocal. A neighbour that does not
          // exist has a state of zero and is left out of the sum; its factor cancels from the others.
          float p[3];
#pragma unroll
          for (int f = 0; f < 3; f++)
            p[f] = 1.f + power_of_two(least(made[2 + f][e] * -LOG2E + exponent[f][c], 57.6f));
          const float n0 = p[1] * p[2], n1 = p[0] * p[2], n2 = p[0] * p[1];
          const float sum = (MASKED ? e1 * n1 : n1) + e0 * n0 + e2 * n2, floor = (EPSILON * p[0]) * n0;
          const float left = r ? was[e - 1] : c ? outer[0].y : outer[0].x;
          const float right = r ? (c ? outer[1].y : outer[1].x) : was[e + 1];
          const float mix = n0 * left + n1 * was[e] + n2 * right;
          const float lam = made[0][e] + projection.bias[0][c];
          float state = mix * reciprocal(fmaxf(sum, floor)) + lam * half_of(vx, c);
          state = bits & 8 ? state : 0.f;
          h[T][e] = state;
          gated[c] = MASKED && !(bits & 8) ? 0.f : (made[1][e] + projection.bias[1][c]) * state;
        }
        *(float2*)(now + (T * 8 + r + 1) * STATE) = {h[T][r], h[T][2 + r]};
        out[seat.own[r] + T * 32 * OWN] = pack_pair<DTYPE == 2>(gated[0], gated[1]);
      }
    }
    mask += mask_step;
  }
  copies_wait<0>();
  __syncthreads();
  flush(outs + (way.lines & 1 ? 0 : LINE * OWN), y);
}
