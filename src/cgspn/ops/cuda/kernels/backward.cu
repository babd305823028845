#include "common.cuh"

// The adjoint scan: lines in reverse, one block per direction, image and group of channels, as in forward.cu. It reads
// the state h (with MEAN: h / n, and n) that the forward saved in the input's dtype, and writes every gradient once.
// The gradient of x has one plane per direction, merged at the end in float32. No atomics, so it is deterministic.
//
// Lines are split across a cluster as in forward.cu. The owner of a position also writes its contribution to the halo.
//
// With g[i] the gradient of the state of line i: position j of line i sends w0 g to position j-1 of line i-1,
// w1 g to j and w2 g to j+1. w0 g and w2 g pass between threads through shared memory.
//
// With MEAN, y = u m, m = h / n, and n is one more channel whose x is 1: the gradient of h is u dy / n, that of n
// -sum(u dy m) / n over the channels of a group. A neighbour's h is its m times its n, so both sides of the differences
// in the gradient of the logits contain the same rounded m.

struct BackwardArguments {
  View x, lam, u, logits, keep, dy, h, mask, dx, dlam, du, dlogits, dkeep, n;
  Shape s;
};

// Shared memory holds h of the previous line, x, dy and the parameters: lam, three logits, u and keep. With SHARE the
// parameters are too narrow for such copies; those of the next line are loaded into registers.
constexpr int MAPS = SHARE ? 3 : 7 + NORMALISE + FORGET;

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER scan_backward(const __grid_constant__ BackwardArguments a) {
  char* const shared = shared_memory();
  const Shape& s = a.s;
  const Walk walk(s);
  const int last = walk.lines - 1;
  const int line_slots = s.lanes * s.rows;
  const int plane = (s.rows + 2) * s.lanes;
  float* sent = (float*)shared;  // two lines sent to the left and two sent to the right
  float* const n_sent = sent + 4 * plane * VEC;  // the same of n
  char* stages = shared + 4 * plane * COUNTED * 4;
  const int map_bytes = line_slots * BYTES, stage_bytes = MAPS * map_bytes, count = line_slots * SETS;
  float* const n_stages = (float*)(stages + (STAGES * stage_bytes + 15) / 16 * 16);  // n of the previous line
  Mailbox<3 + 3 * MEAN> mailbox(n_stages + MEAN * STAGES * count, s);
  for (int k = threadIdx.x; k < 4 * plane * COUNTED; k += blockDim.x) sent[k] = 0.f;

  const i64 sign = walk.backwards ? 1 : -1;  // from the last line of the scan to its first
#define STEP(v) (sign * walk.line(a.v))
  const char *x = walk.start(a.x, last), *lam = walk.start_parameter(a.lam, last),
             *u = walk.start_parameter(a.u, last), *logits = walk.start_parameter(a.logits, last),
             *keep = walk.start_parameter(a.keep, last), *dy = walk.start(a.dy, last), *h = walk.start(a.h, last),
             *n_at = walk.start_parameter(a.n, last), *mask = walk.start(a.mask, last);
  char *dx = walk.start(a.dx, last), *dlam = walk.start_parameter(a.dlam, last), *du = walk.start_parameter(a.du, last),
       *dlogits = walk.start_parameter(a.dlogits, last), *dkeep = walk.start_parameter(a.dkeep, last);
  const bool works = walk.works(s);
  Vec state;                        // h of the current line
  float kept[VEC];                  // w1 g, which this position sends to itself
  float total[SETS], n_kept[SETS];  // the same of n
  if (works) state = load(h);
#pragma unroll
  for (int k = 0; k < VEC; k++) kept[k] = 0.f;
#pragma unroll
  for (int k = 0; k < SETS; k++) {
    n_kept[k] = 0.f;
    if (MEAN && works) total[k] = ((const float*)n_at)[k];
  }
  h += STEP(h), n_at += STEP(n);

  auto fetch = [&](int stage, bool first) {
    if (works) {
      char* to = stages + stage * stage_bytes + walk.slot * BYTES;
      if (!first) copy_in(to, h);
      if constexpr (MEAN)
        if (!first) {
          float* there = n_stages + stage * count + walk.slot * SETS;
#pragma unroll
          for (int k = 0; k < SETS; k++) copy_async<4>(there + k, n_at + 4 * k);
        }
      copy_in(to + map_bytes, x);
      copy_in(to + 2 * map_bytes, dy);
      if constexpr (!SHARE) {
        copy_in(to + 3 * map_bytes, lam);
        copy_in(to + 4 * map_bytes, logits);
        copy_in(to + 5 * map_bytes, logits + a.logits.k);
        copy_in(to + 6 * map_bytes, logits + 2 * a.logits.k);
        if constexpr (NORMALISE) copy_in(to + 7 * map_bytes, u);
        if constexpr (FORGET) copy_in(to + 8 * map_bytes, keep);
      }
    }
    h += STEP(h), n_at += STEP(n), x += STEP(x), dy += STEP(dy);
    if constexpr (!SHARE) lam += STEP(lam), logits += STEP(logits), u += STEP(u), keep += STEP(keep);
  };
  Parameters ahead;  // with SHARE: the parameters of the next line
  auto fetch_single = [&]() {
    if (works) {
      ahead.lam = load_parameter(lam);
      ahead.l0 = load_parameter(logits);
      ahead.l1 = load_parameter(logits + a.logits.k);
      ahead.l2 = load_parameter(logits + 2 * a.logits.k);
      if constexpr (NORMALISE) ahead.u = load_parameter(u);
      if constexpr (FORGET) ahead.keep = load_parameter(keep);
    }
    lam += STEP(lam), logits += STEP(logits), u += STEP(u), keep += STEP(keep);
  };
  if constexpr (SHARE) fetch_single();

#pragma unroll
  for (int n = 0; n < STAGES - 1; n++) {
    if (n < walk.lines) fetch(n, n == last);
    copies_commit();
  }
  if constexpr (SPLIT > 1) cluster_arrive(), cluster_wait();  // all blocks of the cluster have started
  bool waiting = false;  // for the neighbours' contributions
  int filling = STAGES - 1, stage = 0, phase = s.chunk ? last % s.chunk : -1;  // line of the chunk
  for (int n = 0; n < walk.lines; n++) {
    float* to_left = sent + (n & 1 ? 0 : 2) * plane * VEC;
    float* to_right = to_left + plane * VEC;
    float *n_to_left = n_sent + (n & 1 ? 0 : 2) * plane * SETS, *n_to_right = n_to_left + plane * SETS;
    if (waiting) {
      cluster_wait();
      if (works && !walk.owns(s)) {
        const int index = walk.slot + s.lanes;
        float arrived[VEC];
        mailbox.take(s, walk, 0, arrived);
        state_put(to_left, plane, index, arrived);
        mailbox.take(s, walk, 1, kept);
        mailbox.take(s, walk, 2, arrived);
        state_put(to_right, plane, index, arrived);
        if constexpr (MEAN) {
          mailbox.template take<SETS>(s, walk, 3, arrived);
          state_put<SETS>(n_to_left, plane, index, arrived);
          mailbox.template take<SETS>(s, walk, 4, n_kept);
          mailbox.template take<SETS>(s, walk, 5, arrived);
          state_put<SETS>(n_to_right, plane, index, arrived);
        }
      }
      mailbox.odd ^= 1;
    }
    copies_wait<STAGES - 2>();
    __syncthreads();  // copies and contributions of other threads have arrived; the stage to fill is free
    if (n + STAGES - 1 < walk.lines) fetch(filling, n + STAGES - 1 == last);
    copies_commit();
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    const Parameters single = ahead;
    if (SHARE && n + 1 < walk.lines) fetch_single();
    const bool restart = n == last || phase == 0;  // no gradient arrives from the next line
    phase = phase == 0 ? s.chunk - 1 : phase - 1;
    const bool exchange = SPLIT > 1 && (n + 1) % (HALO + (SPLIT == 1)) == 0 && n + 1 < walk.lines;
    float* send_left = sent + (n & 1 ? 2 : 0) * plane * VEC;
    float* send_right = send_left + plane * VEC;
    float *n_send_left = n_sent + (n & 1 ? 2 : 0) * plane * SETS, *n_send_right = n_send_left + plane * SETS;
    if (works) {
      const int j = walk.j, index = walk.slot;
      const char* from = stages + stage * stage_bytes + index * BYTES;
      const u32 bits = surroundings(walk, j, last - n, mask, -STEP(mask), walk.across(a.mask));
      Vec none;
#pragma unroll
      for (int k = 0; k < WORDS; k++) none.w[k] = 0;
      const Vec before = restart ? none : load(from);
      const bool own = walk.owns(s);  // a halo position writes no gradients
      const Vec left = restart || j == 0 || !own ? none : load(from - s.lanes * BYTES);
      const Vec right = restart || j + 1 == walk.positions || !own ? none : load(from + s.lanes * BYTES);
      const Vec vx = load(from + map_bytes), vdy = load(from + 2 * map_bytes);
      Parameters now;
      if constexpr (SHARE) {
        now = single;
      } else {
        auto waiting = [&](int map) {
          const Vec v = load(from + map * map_bytes);
          return *(const Parameter*)&v;
        };
        now.lam = waiting(3), now.l0 = waiting(4), now.l1 = waiting(5), now.l2 = waiting(6);
        if constexpr (NORMALISE) now.u = waiting(7);
        if constexpr (FORGET) now.keep = waiting(8);
      }
      float from_right[VEC], from_left[VEC], o_dx[VEC], o_dlam[SETS], o_du[SETS], o_d[3][SETS], o_keep[SETS];
      state_get(to_left, plane, index + 2 * s.lanes, from_right);  // sent by position j+1 to its left
      state_get(to_right, plane, index, from_left);
      float n_left[SETS], n_before[SETS], n_right[SETS], n_from_right[SETS], n_from_left[SETS], share = 1.f;
      if constexpr (MEAN) {
        const float* at = n_stages + stage * count + index * SETS;
#pragma unroll
        for (int k = 0; k < SETS; k++) {
          n_before[k] = restart ? 0.f : at[k];
          n_left[k] = restart || j == 0 || !own ? 0.f : at[k - s.lanes * SETS];
          n_right[k] = restart || j + 1 == walk.positions || !own ? 0.f : at[k + s.lanes * SETS];
        }
        state_get<SETS>(n_to_left, plane, index + 2 * s.lanes, n_from_right);
        state_get<SETS>(n_to_right, plane, index, n_from_left);
      }
      float g[VEC], lam_grad = 0.f, u_grad = 0.f, d0 = 0.f, d1 = 0.f, d2 = 0.f, w0 = 0.f, w1 = 0.f, w2 = 0.f;
#pragma unroll
      for (int k = 0; k < VEC; k++) {
        const float y_grad = get(vdy, k);
        if (MEAN && k < SETS) share = reciprocal(fmaxf(total[k], SMALLEST));
        g[k] = kept[k] + from_right[k] + from_left[k] + (NORMALISE ? get(now.u, k) * share * y_grad : y_grad);
        if (MASKED && !(bits & 8)) g[k] = 0.f;
        o_dx[k] = MASKED && !(bits & 8) ? 0.f : g[k] * get(now.lam, k);
        if constexpr (!SHARE) lam_grad = u_grad = d0 = d1 = d2 = 0.f;
        lam_grad += g[k] * get(vx, k);
        if constexpr (NORMALISE) u_grad += y_grad * get(state, k);
        d0 += g[k] * get(left, k), d1 += g[k] * get(before, k), d2 += g[k] * get(right, k);
        if (SHARE && k < VEC - 1) continue;
        const int set = SHARE ? 0 : k;  // in its last channel
        float n_grad = 0.f;
        if constexpr (MEAN) {
          n_grad = n_kept[set] + n_from_right[set] + n_from_left[set];
          if (total[set] >= SMALLEST) n_grad -= get(now.u, k) * share * u_grad;
          if (MASKED && !(bits & 8)) n_grad = 0.f;
          lam_grad += n_grad;
          d0 = d0 * fmaxf(n_left[set], SMALLEST) + n_grad * n_left[set];
          d1 = d1 * fmaxf(n_before[set], SMALLEST) + n_grad * n_before[set];
          d2 = d2 * fmaxf(n_right[set], SMALLEST) + n_grad * n_right[set];
        }
        if constexpr (NORMALISE) {
          const Weights weights(get(now.l0, k), get(now.l1, k), get(now.l2, k), bits);
          w0 = weights.w[0], w1 = weights.w[1], w2 = weights.w[2];
          const float mixed = w0 * d0 + w1 * d1 + w2 * d2, shared_part = weights.clamped ? 0.f : mixed;
          float stays = 1.f;
          if constexpr (FORGET) {
            const float e = exp_minus(get(now.keep, k));
            stays = reciprocal(1.f + e);
            o_keep[set] = mixed * stays * (e * stays);
          }
          // dlogit = (dw - shared) w (1 - sigmoid); 1 - sigmoid = e / (1 + e), the three with one reciprocal
          const float e0 = fminf(weights.e[0], 1e12f), e1 = fminf(weights.e[1], 1e12f), e2 = fminf(weights.e[2], 1e12f);
          const float a0 = 1.f + e0, a1 = 1.f + e1, a2 = 1.f + e2, pair = a1 * a2, r = stays * reciprocal(a0 * pair);
          o_d[0][set] = (d0 - shared_part) * w0 * (e0 * pair * r);
          o_d[1][set] = (d1 - shared_part) * w1 * (e1 * (a0 * a2) * r);
          o_d[2][set] = (d2 - shared_part) * w2 * (e2 * (a0 * a1) * r);
          w0 *= stays, w1 *= stays, w2 *= stays;
          o_du[set] = u_grad;
          if (MASKED && !(bits & 8)) {
            lam_grad = o_du[set] = o_d[0][set] = o_d[1][set] = o_d[2][set] = o_keep[set] = 0.f;
            w0 = w1 = w2 = 0.f;
          }
        } else {
          w0 = get(now.l0, k), w1 = get(now.l1, k), w2 = get(now.l2, k);
          o_d[0][set] = d0, o_d[1][set] = d1, o_d[2][set] = d2;
        }
        o_dlam[set] = lam_grad;
        if constexpr (MEAN) {
          n_kept[set] = restart ? 0.f : w1 * n_grad;
          n_from_right[set] = restart ? 0.f : w0 * n_grad;
          n_from_left[set] = restart ? 0.f : w2 * n_grad;
          total[set] = n_before[set];
        }
        if constexpr (!SHARE) {
          kept[k] = restart ? 0.f : w1 * g[k];
          from_right[k] = restart ? 0.f : w0 * g[k];
          from_left[k] = restart ? 0.f : w2 * g[k];
        }
      }
      if constexpr (SHARE) {
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          kept[k] = restart ? 0.f : w1 * g[k];
          from_right[k] = restart ? 0.f : w0 * g[k];
          from_left[k] = restart ? 0.f : w2 * g[k];
        }
      }
      state_put(send_left, plane, index + s.lanes, from_right);
      state_put(send_right, plane, index + s.lanes, from_left);
      if constexpr (MEAN) {
        state_put<SETS>(n_send_left, plane, index + s.lanes, n_from_right);
        state_put<SETS>(n_send_right, plane, index + s.lanes, n_from_left);
      }
      state = before;
      if (own) {
        if (exchange) {
          mailbox.put(s, walk, 0, from_right);
          mailbox.put(s, walk, 1, kept);
          mailbox.put(s, walk, 2, from_left);
          if constexpr (MEAN) {
            mailbox.template put<SETS>(s, walk, 3, n_from_right);
            mailbox.template put<SETS>(s, walk, 4, n_kept);
            mailbox.template put<SETS>(s, walk, 5, n_from_left);
          }
        }
        if constexpr (MERGE)
          store_plane(dx, pack(o_dx));
        else
          store(dx, pack(o_dx));
        store_parameter(dlam, o_dlam);
        if constexpr (NORMALISE) store_parameter(du, o_du);
        if constexpr (FORGET) store_parameter(dkeep, o_keep);
        store_parameter(dlogits, o_d[0]);
        store_parameter(dlogits + a.dlogits.k, o_d[1]);
        store_parameter(dlogits + 2 * a.dlogits.k, o_d[2]);
      }
    }
    if (exchange) cluster_arrive();
    waiting = exchange;
    dx += STEP(dx), dlam += STEP(dlam), du += STEP(du), dlogits += STEP(dlogits), dkeep += STEP(dkeep);
    mask += STEP(mask);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
}
