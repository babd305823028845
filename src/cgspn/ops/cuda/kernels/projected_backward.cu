// Adjoint of the projected scan, with lines in reverse and a block for GROUPS x 16 channels of one direction of an
// image. It recomputes the parameters from x and reads the state that projected_forward (GATED = 0) wrote. For every
// position it writes [D, 6, C]: the gradients of the five parameters, and lam g, the direct gradient of x. Products
// outside of this kernel turn them into the gradients of x and of the weights. The bias gradient is summed here in
// float32, one part per block, without atomics. See backward.cu for the recurrence.

#include "projected.cuh"

struct ProjectedBackwardArguments {
  View x, weight, bias, mask, dy, h, out, dbias;  // dbias [B, D, 5, C] float32, contiguous
  ProjectedShape s;
};

constexpr int OUTPUTS = 6;
constexpr int STORES = (OUTPUTS * LINE * OWN + THREADS - 1) / THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    projected_backward(const __grid_constant__ ProjectedBackwardArguments a) {
  const ProjectedShape& s = a.s;
  u32 block = blockIdx.x;
  const int d = block % s.D;
  block /= s.D;
  const int first = block % s.blocks * OWN, b = block / s.blocks;  // chunk of channels, image
  const int own = min(OWN, s.chunks - first);
  const Seat seat(first);
  const bool works = 2 * seat.n < own;
  Way way;
  way.take(s, d);
  const int last = way.lines - 1;

  constexpr int STAGE = LINE * (CHUNKS + 2 * OWN);  // x, dy, h of the previous line
  uint4* const stages = (uint4*)shared_memory();
  uint4* const outs = stages + STAGES * STAGE;  // [2][OUTPUTS][LINE][OWN]
  float* const sent = (float*)(outs + 2 * OUTPUTS * LINE * OWN);  // [2][2][GROUPS][LINE + 2][STATE]: to left, to right
  constexpr int PLANE = GROUPS * (LINE + 2) * STATE;
  uint4* const room = (uint4*)(sent + 4 * PLANE);
  for (int k = threadIdx.x; k < STAGES * STAGE; k += THREADS) stages[k] = {0, 0, 0, 0};
  for (int k = threadIdx.x; k < 4 * PLANE; k += THREADS) sent[k] = 0.f;
  Projection projection(seat, room);
  if (works) projection.load(a.weight.p, a.bias.p, d, (first + 2 * seat.n) * 8, s.C, seat);
  __syncthreads();
  projection.keep();

  const char *x = way.start(a.x, b, d, last), *dy = way.start(a.dy, b, d, last) + first * 16;
  const char *h = way.start(a.h, b, d, last) + first * 16, *mask = way.start(a.mask, b, d, last);
  char* out = way.start(a.out, b, d, last) + first * 16;
  const i64 mask_step = way.step(a.mask), mask_across = way.across(a.mask), out_across = way.across(a.out);

  u32 state[TILES][2];   // h of the current line, two channels per word
  float kept[TILES][4];  // what a position contributes to itself
  float sums[PARAMETERS][2];
#pragma unroll
  for (int T = 0; T < TILES; T++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int j = seat.row + T * 8 + r;
      state[T][r] = 0;
      if (seat.chunk < own && j < way.positions)
        state[T][r] = *(const u32*)(h + j * way.across(a.h) + seat.chunk * 16 + seat.g % 4 * 4);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) kept[T][e] = 0.f;
  }
#pragma unroll
  for (int f = 0; f < PARAMETERS; f++) sums[f][0] = sums[f][1] = 0.f;
  h -= way.step(a.h);

  auto fetch = [&](int stage, int line) {
    uint4* to = stages + stage * STAGE;
    fetch_line<CHUNKS, place>(to, x, way.across(a.x), way.positions, s.chunks);
    fetch_line<OWN, place_own>(to + LINE * CHUNKS, dy, way.across(a.dy), way.positions, own);
    if (line > 0)
      fetch_line<OWN, place_own>(to + LINE * (CHUNKS + OWN), h, way.across(a.h), way.positions, own);
    x -= way.step(a.x), dy -= way.step(a.dy), h -= way.step(a.h);
  };
  auto flush = [&](const uint4* from) {
#pragma unroll
    for (int k = 0; k < STORES; k++) {
      const int n = threadIdx.x + k * THREADS, map = n / (LINE * OWN), row = n / OWN % LINE, chunk = n % OWN;
      if (map < OUTPUTS && row < way.positions && chunk < own)
        store_plane(out + row * out_across + map * a.out.k + chunk * 16,
                    load(from + map * LINE * OWN + place_own(row, chunk)));
    }
    out -= way.step(a.out);
  };

#pragma unroll
  for (int n = 0; n < STAGES - 1; n++) {
    if (n < way.lines) fetch(n, last - n);
    copies_commit();
  }
  int stage = 0, filling = STAGES - 1;
  for (int n = 0; n < way.lines; n++) {
    const int i = last - n;
    copies_wait<STAGES - 2>();
    __syncthreads();
    if (i >= STAGES - 1) fetch(filling, i - (STAGES - 1));
    copies_commit();
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    if (n > 0) flush(outs + (n & 1 ? 0 : OUTPUTS * LINE * OWN));
    const uint4* line_x = stages + stage * STAGE;
    const uint4* line_dy = line_x + LINE * CHUNKS;
    const uint4* line_h = line_dy + LINE * OWN;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    u32* put = (u32*)(outs + (n & 1 ? OUTPUTS * LINE * OWN : 0));
    const float *to_left = sent + (n & 1 ? 0 : 2) * PLANE + seat.state, *to_right = to_left + PLANE;
    float *send_left = sent + (n & 1 ? 2 : 0) * PLANE + seat.state, *send_right = send_left + PLANE;
    __syncwarp();  // lanes may have diverged in their copies; products need them converged
#pragma unroll
    for (int T = 0; T < TILES; T++) {
      if (!works || seat.row - 2 * seat.t + T * 8 >= way.positions) continue;
      float made[PARAMETERS][4];
      projection.make<true>(made, line_x, T, seat);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int j = seat.row + T * 8 + r, at = T * 8 + r;
        const u32 bits = around(way, j, i, mask, mask_step, mask_across);
        const bool inside = bits & 8;
        const u32 vx = ((const u32*)line_x)[seat.all[r] + T * 32 * CHUNKS];
        const u32 vdy = ((const u32*)line_dy)[seat.own[r] + T * 32 * OWN];
        u32 near[3];
#pragma unroll
        for (int f = 0; f < 3; f++) {
          const int row = j + f - 1;
          const bool there = i > 0 && row >= 0 && row < way.positions;
          near[f] = there ? ((const u32*)line_h)[place_own(row, seat.chunk) * 4 + seat.g % 4] : 0;
        }
        const float2 from_right = *(const float2*)(to_left + (at + 2) * STATE);
        const float2 from_left = *(const float2*)(to_right + at * STATE);
        float o[OUTPUTS][2], left[2], right[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int e = 2 * c + r;
          float p[PARAMETERS];
#pragma unroll
          for (int f = 0; f < PARAMETERS; f++) p[f] = made[f][e] + projection.bias[f][c];
          const float y_grad = half_of(vdy, c);
          float g = kept[T][e] + (c ? from_right.y : from_right.x) + (c ? from_left.y : from_left.x) + p[1] * y_grad;
          g = inside ? g : 0.f;
          const Weights weights(p[2], p[3], p[4], bits);
          const float w0 = weights.w[0], w1 = weights.w[1], w2 = weights.w[2];
          const float d0 = g * half_of(near[0], c), d1 = g * half_of(near[1], c), d2 = g * half_of(near[2], c);
          const float mean = weights.clamped ? 0.f : w0 * d0 + w1 * d1 + w2 * d2;
          const float x0 = fminf(weights.e[0], 1e12f), x1 = fminf(weights.e[1], 1e12f), x2 = fminf(weights.e[2], 1e12f);
          const float a0 = 1.f + x0, a1 = 1.f + x1, a2 = 1.f + x2, pair = a1 * a2, inverse = reciprocal(a0 * pair);
          o[0][c] = g * half_of(vx, c);
          o[1][c] = y_grad * half_of(state[T][r], c);
          o[2][c] = (d0 - mean) * w0 * (x0 * pair * inverse);
          o[3][c] = (d1 - mean) * w1 * (x1 * (a0 * a2) * inverse);
          o[4][c] = (d2 - mean) * w2 * (x2 * (a0 * a1) * inverse);
          o[5][c] = g * p[0];
#pragma unroll
          for (int f = 0; f < OUTPUTS; f++) {
            o[f][c] = inside ? o[f][c] : 0.f;
            if (f < PARAMETERS) sums[f][c] += o[f][c];
          }
          kept[T][e] = inside ? w1 * g : 0.f;
          left[c] = inside ? w0 * g : 0.f;
          right[c] = inside ? w2 * g : 0.f;
        }
        *(float2*)(send_left + (at + 1) * STATE) = {left[0], left[1]};
        *(float2*)(send_right + (at + 1) * STATE) = {right[0], right[1]};
#pragma unroll
        for (int f = 0; f < OUTPUTS; f++)
          put[seat.own[r] + T * 32 * OWN + f * LINE * OWN * 4] = pack_pair<DTYPE == 2>(o[f][0], o[f][1]);
        state[T][r] = near[1];
      }
    }
    mask -= mask_step;
  }
  copies_wait<0>();
  __syncthreads();
  flush(outs + (way.lines & 1 ? 0 : OUTPUTS * LINE * OWN));

  float* parts = (float*)stages;  // [warps][lanes][PARAMETERS][2]
#pragma unroll
  for (int f = 0; f < PARAMETERS; f++)
#pragma unroll
    for (int c = 0; c < 2; c++) parts[(threadIdx.x * PARAMETERS + f) * 2 + c] = sums[f][c];
  __syncthreads();
  for (int k = threadIdx.x; k < own * 8 * PARAMETERS; k += THREADS) {
    const int channel = k % (own * 8), f = k / (own * 8);  // channel % 16 = 2 g + c of group channel / 16
    float sum = 0.f;
    for (int part = 0; part < ROW_WARPS; part++)
      for (int t = 0; t < 4; t++) {
        const int thread = (part * GROUPS + channel / 16) * 32 + channel % 16 / 2 * 4 + t;
        sum += parts[(thread * PARAMETERS + f) * 2 + channel % 2];
      }
    ((float*)a.dbias.p)[(((i64)b * s.D + d) * PARAMETERS + f) * s.C + first * 8 + channel] = sum;
  }
}
