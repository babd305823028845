#include "common.cuh"

// One block scans one direction of one image for a group of channels, line by line. The state of a line passes between
// threads through shared memory. A thread needs only its own inputs, so it loads those of the next STAGES lines into
// registers. Through shared memory (cp.async) each would pass the load/store unit twice, the bottleneck at small
// batches. There is one barrier per line, for the state.
//   SAVE   1: also write the state for the backward, and n in float32

struct ForwardArguments {
  View x, lam, u, logits, keep, y, h, mask, n;
  Shape s;
};

// Narrow threads compute weights and inputs before the barrier, outside of the dependency from line to line, and load
// the line after next early. Wide threads would need 32 more registers for this, and memory is their bottleneck.
constexpr bool LATE = !SHARE && VEC >= 8;

// The inputs of a position.
struct Inputs : Parameters {
  Vec x;
};

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER scan_forward(const __grid_constant__ ForwardArguments a) {
  char* const shared = shared_memory();
  const Shape& s = a.s;
  const int line_slots = s.lanes * s.rows;
  const int plane = (s.rows + 2) * s.lanes;  // a line of the state, one empty position at each end
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
  const bool works = walk.works(s);
  const int slot = walk.slot;

  auto fetch = [&](Inputs& to) {
    if (works) {
      to.x = load_shared_by_directions(x);
      to.lam = load_parameter(lam);
      to.l0 = load_parameter(logits);
      to.l1 = load_parameter(logits + a.logits.k);
      to.l2 = load_parameter(logits + 2 * a.logits.k);
      if constexpr (NORMALISE) to.u = load_parameter(u);
      if constexpr (FORGET) to.keep = load_parameter(keep);
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

  Inputs ring[STAGES];
#pragma unroll
  for (int n = 0; n < STAGES; n++)
    if (n < walk.lines) fetch(ring[n]);
  if constexpr (SPLIT > 1) cluster_arrive(), cluster_wait();  // all blocks of the cluster have started
  float h[VEC], n[SETS];
  int since = 0;
  bool waiting = false;  // for the neighbours' states
  auto line = [&](int i, Inputs& inputs) {
    float w[3][SETS], drive[VEC], scale[SETS];  // scale: lam alone, the input of n
    Parameter gate;
    u32 bits;
    auto prepare = [&](const Inputs& from, int k) {
      drive[k] = get(from.lam, k) * get(from.x, k);
      if (k >= SETS) return;
      scale[k] = get(from.lam, k);
      weigh(from, k, bits, w);
    };
    if (works) {
      if constexpr (NORMALISE) gate = inputs.u;
      bits = surroundings(walk, walk.j, i, mask, mask_step, walk.across(a.mask));
      if constexpr (!LATE) {
#pragma unroll
        for (int k = 0; k < VEC; k++) prepare(inputs, k);
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
      if (works && !walk.owns(s)) {
        mailbox.take(s, walk, 0, h);
        state_put(before, plane, slot + s.lanes, h);
        if constexpr (MEAN) {
          mailbox.template take<SETS>(s, walk, 1, n);
          state_put<SETS>(n_before, plane, slot + s.lanes, n);
        }
      }
      mailbox.odd ^= 1;
    }
    __syncthreads();
    if (works) {  // lines start with an empty position: position j - 1 is at `slot`
      float left[VEC], right[VEC], out[VEC], kept[VEC], n_left[SETS], n_right[SETS], share = 1.f;
      state_get(before, plane, slot, left);
      state_get(before, plane, slot + 2 * s.lanes, right);
      if constexpr (MEAN) {
        state_get<SETS>(n_before, plane, slot, n_left);
        state_get<SETS>(n_before, plane, slot + 2 * s.lanes, n_right);
      }
#pragma unroll
      for (int k = 0; k < VEC; k++) {
        const int set = SHARE ? 0 : k;
        if constexpr (LATE) prepare(inputs, k);
        const bool outside = MASKED && !(bits & 8);
        const float w0 = w[0][set], w1 = w[1][set], w2 = w[2][set];
        if (MEAN && k < SETS) {
          float sum = scale[k];
          if (!restart) sum += w0 * n_left[k] + w1 * n[k] + w2 * n_right[k];
          n[k] = outside ? 0.f : sum;
          share = reciprocal(fmaxf(n[k], SMALLEST));
        }
        float sum = drive[k];
        if (!restart) sum += w0 * left[k] + w1 * h[k] + w2 * right[k];
        h[k] = outside ? 0.f : sum;
        kept[k] = h[k] * share;
        out[k] = NORMALISE ? (outside ? 0.f : get(gate, k) * kept[k]) : kept[k];
      }
      state_put(now, plane, slot + s.lanes, h);
      if constexpr (MEAN) state_put<SETS>(n_now, plane, slot + s.lanes, n);
      if (walk.owns(s)) {
        if constexpr (MERGE)
          store_plane(y, pack(out));
        else
          store(y, pack(out));
        if constexpr (SAVE) store(saved, pack(kept));
        if constexpr (SAVE && MEAN) {
#pragma unroll
          for (int k = 0; k < SETS; k++) ((float*)counted)[k] = n[k];
        }
      }
    }
    const bool exchange = SPLIT > 1 && (i + 1) % (HALO + (SPLIT == 1)) == 0 && i + 1 < walk.lines;
    if (exchange) {
      if (works && walk.owns(s)) {
        mailbox.put(s, walk, 0, h);
        if constexpr (MEAN) mailbox.template put<SETS>(s, walk, 1, n);
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
