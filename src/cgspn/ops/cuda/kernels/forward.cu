#include "common.cuh"

// One block scans one direction of one image for a group of channels, line by line. The state of a line passes between
// threads through shared memory. A thread needs only its own inputs, so it loads those of the next STAGES lines into
// registers. Through shared memory (cp.async) each would pass the load/store unit twice, the bottleneck at small
// batches. There is one barrier per line, for the state.
//   SAVE   1: also write the state for the backward, and n in float32

struct ForwardArguments {
  View x, lam, u, logits, keep, y, h, mask, out, n;
  Shape s;
};

// Narrow threads compute weights and inputs before the barrier, outside of the dependency from line to line, and load
// the line after next early. Wide threads would need 32 more registers for this, and memory is their bottleneck.
constexpr bool LATE = !SHARE && VEC * POS >= 8;

// The inputs of a position.
struct Inputs : Parameters {
  Vec x;
};

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER scan_forward(const __grid_constant__ ForwardArguments a) {
  char* const shared = shared_memory();
  const Shape& s = a.s;
  const int line_slots = s.lanes * s.rows;
  const int plane = (s.rows * POS + 2) * s.lanes;  // a line of the state, one empty position at each end
  float* state = (float*)shared;                   // two lines
  float* const counts = state + 2 * plane * VEC;   // the same for n
  Mailbox<1 + MEAN> mailbox(state + 2 * plane * COUNTED, s);

  const Walk walk(s);
  for (int k = threadIdx.x; k < 2 * plane * COUNTED; k += blockDim.x) state[k] = 0.f;

  const i64 sign = walk.backwards ? -1 : 1;
  const i64 x_step = sign * walk.line(a.x), lam_step = sign * walk.line(a.lam), u_step = sign * walk.line(a.u),
            logits_step = sign * walk.line(a.logits), keep_step = sign * walk.line(a.keep),
            y_step = sign * walk.line(a.y), h_step = sign * walk.line(a.h), n_step = sign * walk.line(a.n),
            mask_step = sign * walk.line(a.mask);
  const char *x = walk.start(a.x, 0), *lam = walk.start_parameter(a.lam, 0), *u = walk.start_parameter(a.u, 0),
             *logits = walk.start_parameter(a.logits, 0), *keep = walk.start_parameter(a.keep, 0),
             *mask = walk.start(a.mask, 0);
  char *y = walk.start(a.y, 0), *saved = walk.start(a.h, 0), *counted = walk.start_parameter(a.n, 0);
  bool works[POS];
#pragma unroll
  for (int p = 0; p < POS; p++) works[p] = walk.works(s, p);

  auto fetch = [&](Inputs (&to)[POS]) {
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        const i64 jump = p * s.rows;
        const char* from = logits + jump * walk.across(a.logits);
        to[p].x = load_shared_by_directions(x + jump * walk.across(a.x));
        to[p].lam = load_parameter(lam + jump * walk.across(a.lam));
        to[p].l0 = load_parameter(from);
        to[p].l1 = load_parameter(from + a.logits.k);
        to[p].l2 = load_parameter(from + 2 * a.logits.k);
        if constexpr (NORMALISE) to[p].u = load_parameter(u + jump * walk.across(a.u));
        if constexpr (FORGET) to[p].keep = load_parameter(keep + jump * walk.across(a.keep));
      }
    x += x_step, lam += lam_step, u += u_step, logits += logits_step, keep += keep_step;
  };
  // Weights of the neighbours for the k-th parameter group.
  auto weigh = [&](const Inputs& from, int k, u32 bits, float (&w)[3][SETS]) {
    const float l0 = get(from.l0, k), l1 = get(from.l1, k), l2 = get(from.l2, k);
    w[0][k] = l0, w[1][k] = l1, w[2][k] = l2;
    if constexpr (NORMALISE) {
      const Weights weights(l0, l1, l2, bits);
      const float kept = FORGET ? reciprocal(1.f + exp_minus(get(from.keep, k))) : 1.f;
      w[0][k] = kept * weights.w[0], w[1][k] = kept * weights.w[1], w[2][k] = kept * weights.w[2];
    }
  };

  Inputs ring[STAGES][POS];
#pragma unroll
  for (int n = 0; n < STAGES; n++)
    if (n < walk.lines) fetch(ring[n]);
  if constexpr (SPLIT > 1) cluster_arrive(), cluster_wait();  // all blocks of the cluster have started
  float h[POS][VEC], n[POS][SETS];
  int since = 0;
  bool waiting = false;  // for the neighbours' states
  auto line = [&](int i, Inputs (&inputs)[POS]) {
    float w[POS][3][SETS], drive[POS][VEC], scale[POS][SETS];  // scale: lam alone, the input of n
    Parameter gate[POS];
    u32 bits[POS];
    auto prepare = [&](const Inputs& from, int p, int k) {
      drive[p][k] = get(from.lam, k) * get(from.x, k);
      if (k >= SETS) return;
      scale[p][k] = get(from.lam, k);
      weigh(from, k, bits[p], w[p]);
    };
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        if constexpr (NORMALISE) gate[p] = inputs[p].u;
        const i64 jump = p * s.rows;
        bits[p] = surroundings(walk, walk.j + p * s.rows, i, mask + jump * walk.across(a.mask), mask_step,
                               walk.across(a.mask));
        if constexpr (!LATE) {
#pragma unroll
          for (int k = 0; k < VEC; k++) prepare(inputs[p], p, k);
        }
      }
    if (!LATE && i + STAGES < walk.lines) fetch(inputs);
    const bool restart = i == 0 || (s.chunk && since == s.chunk);
    since = restart ? 1 : since + 1;
    float* before = state + ((i & 1) ^ 1) * plane * VEC;
    float* now = state + (i & 1) * plane * VEC;
    float *n_before = counts + ((i & 1) ^ 1) * plane * SETS, *n_now = counts + (i & 1) * plane * SETS;
    if (waiting) {  // the cluster barrier is slow; the work between its two halves hides a part of it
      cluster_wait();
#pragma unroll
      for (int p = 0; p < POS; p++)
        if (works[p] && !walk.owns(s, p)) {
          mailbox.take(s, walk, p, 0, h[p]);
          state_put(before, plane, p * line_slots + walk.slot + s.lanes, h[p]);
          if constexpr (MEAN) {
            mailbox.template take<SETS>(s, walk, p, 1, n[p]);
            state_put<SETS>(n_before, plane, p * line_slots + walk.slot + s.lanes, n[p]);
          }
        }
      mailbox.odd ^= 1;
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        const int index = p * line_slots + walk.slot;  // of position j - 1: lines start with an empty position
        float left[VEC], right[VEC], out[VEC], kept[VEC], n_left[SETS], n_right[SETS], share = 1.f;
        state_get(before, plane, index, left);
        state_get(before, plane, index + 2 * s.lanes, right);
        if constexpr (MEAN) {
          state_get<SETS>(n_before, plane, index, n_left);
          state_get<SETS>(n_before, plane, index + 2 * s.lanes, n_right);
        }
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          const int set = SHARE ? 0 : k;
          if constexpr (LATE) prepare(inputs[p], p, k);
          const bool outside = MASKED && !(bits[p] & 8);
          const float w0 = w[p][0][set], w1 = w[p][1][set], w2 = w[p][2][set];
          if (MEAN && k < SETS) {
            float sum = scale[p][k];
            if (!restart) sum += w0 * n_left[k] + w1 * n[p][k] + w2 * n_right[k];
            n[p][k] = outside ? 0.f : sum;
            share = reciprocal(fmaxf(n[p][k], SMALLEST));
          }
          float sum = drive[p][k];
          if (!restart) sum += w0 * left[k] + w1 * h[p][k] + w2 * right[k];
          h[p][k] = outside ? 0.f : sum;
          kept[k] = h[p][k] * share;
          out[k] = NORMALISE ? (outside ? 0.f : get(gate[p], k) * kept[k]) : kept[k];
        }
        state_put(now, plane, index + s.lanes, h[p]);
        if constexpr (MEAN) state_put<SETS>(n_now, plane, index + s.lanes, n[p]);
        if (!walk.owns(s, p)) continue;
        const i64 jump = p * s.rows;
        char* const to = y + jump * walk.across(a.y);
        if constexpr (MERGE)
          store_plane(to, pack(out));
        else
          store(to, pack(out));
        if constexpr (SAVE) store(saved + jump * walk.across(a.h), pack(kept));
        if constexpr (SAVE && MEAN) {
#pragma unroll
          for (int k = 0; k < SETS; k++) ((float*)(counted + jump * walk.across(a.n)))[k] = n[p][k];
        }
      }
    const bool exchange = SPLIT > 1 && (i + 1) % (HALO + (SPLIT == 1)) == 0 && i + 1 < walk.lines;
    if (exchange) {
#pragma unroll
      for (int p = 0; p < POS; p++)
        if (works[p] && walk.owns(s, p)) {
          mailbox.put(s, walk, p, 0, h[p]);
          if constexpr (MEAN) mailbox.template put<SETS>(s, walk, p, 1, n[p]);
        }
      cluster_arrive();
    }
    if (LATE && i + STAGES < walk.lines) fetch(inputs);
    waiting = exchange;
    y += y_step, saved += h_step, counted += n_step, mask += mask_step;
  };
  for (int first = 0; first < walk.lines; first += STAGES)
#pragma unroll
    for (int n = 0; n < STAGES; n++)
      if (first + n < walk.lines) line(first + n, ring[n]);
}
