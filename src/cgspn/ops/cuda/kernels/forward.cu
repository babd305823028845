// One block walks one direction of one image for a group of channels, line by line; the state of a line crosses
// threads through shared memory, the inputs of the next lines arrive there meanwhile. A thread reads back only what
// it copied itself, so one barrier a line, for the state, is all.
// SAVE: 1 writes the state too, for the backward.

struct ForwardArguments {
  View x, lam, u, logits, y, h, mask, out;
  Shape s;
};

constexpr int MAPS = NORMALISE ? 6 : 5;  // x, lam, three logits, u

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER scan_forward(const __grid_constant__ ForwardArguments a) {
  extern __shared__ __align__(16) char shared[];
  const Shape& s = a.s;
  const Walk walk(s);
  const int line_slots = s.lanes * s.rows;
  const int plane = (s.rows * POS + 2) * s.lanes;       // a line of the state, one empty position at each end
  float* state = (float*)shared;                        // two lines
  char* stages = shared + 2 * plane * VEC * 4;
  const int map_bytes = line_slots * POS * BYTES, stage_bytes = MAPS * map_bytes;
  for (int k = threadIdx.x; k < 2 * plane * VEC; k += blockDim.x) state[k] = 0.f;

  const i64 sign = walk.backwards ? -1 : 1;
  const i64 x_step = sign * walk.line(a.x), lam_step = sign * walk.line(a.lam), u_step = sign * walk.line(a.u),
            logits_step = sign * walk.line(a.logits), y_step = sign * walk.line(a.y), h_step = sign * walk.line(a.h),
            mask_step = sign * walk.line(a.mask);
  const char *x = walk.start(a.x, 0), *lam = walk.start(a.lam, 0), *u = walk.start(a.u, 0),
             *logits = walk.start(a.logits, 0), *mask = walk.start(a.mask, 0);
  char *y = walk.start(a.y, 0), *saved = walk.start(a.h, 0);
  bool works[POS];
#pragma unroll
  for (int p = 0; p < POS; p++) works[p] = walk.j + p * s.rows < walk.positions;

  auto fetch = [&](int stage) {
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        char* to = stages + stage * stage_bytes + (p * line_slots + walk.slot) * BYTES;
        const i64 jump = p * s.rows;
        copy_in(to, x + jump * walk.across(a.x));
        copy_in(to + map_bytes, lam + jump * walk.across(a.lam));
        const char* from = logits + jump * walk.across(a.logits);
        copy_in(to + 2 * map_bytes, from);
        copy_in(to + 3 * map_bytes, from + a.logits.k);
        copy_in(to + 4 * map_bytes, from + 2 * a.logits.k);
        if constexpr (NORMALISE) copy_in(to + 5 * map_bytes, u + jump * walk.across(a.u));
      }
    x += x_step;
    lam += lam_step;
    u += u_step;
    logits += logits_step;
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < walk.lines) fetch(i);
    copies_commit();
  }
  float h[POS][VEC];
  int filling = STAGES - 1, stage = 0, since = 0;
  for (int i = 0; i < walk.lines; i++) {
    if (i + STAGES - 1 < walk.lines) fetch(filling);
    copies_commit();
    filling = filling + 1 == STAGES ? 0 : filling + 1;
    copies_wait<STAGES - 1>();

    float w[POS][3][VEC], drive[POS][VEC];
    Vec gate[POS];
    u32 bits[POS];
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        const char* from = stages + stage * stage_bytes + (p * line_slots + walk.slot) * BYTES;
        const Vec vx = load(from), vlam = load(from + map_bytes), l0 = load(from + 2 * map_bytes),
                  l1 = load(from + 3 * map_bytes), l2 = load(from + 4 * map_bytes);
        if constexpr (NORMALISE) gate[p] = load(from + 5 * map_bytes);
        const i64 jump = p * s.rows;
        bits[p] = surroundings(walk, walk.j + p * s.rows, i, mask + jump * walk.across(a.mask), mask_step,
                               walk.across(a.mask));
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          drive[p][k] = get(vlam, k) * get(vx, k);
          if constexpr (NORMALISE) {
            const Weights weights(get(l0, k), get(l1, k), get(l2, k), bits[p]);
            w[p][0][k] = weights.w[0];
            w[p][1][k] = weights.w[1];
            w[p][2][k] = weights.w[2];
          } else {
            w[p][0][k] = get(l0, k);
            w[p][1][k] = get(l1, k);
            w[p][2][k] = get(l2, k);
          }
        }
      }
    const bool restart = i == 0 || (s.chunk && since == s.chunk);
    since = restart ? 1 : since + 1;
    const float* before = state + ((i & 1) ^ 1) * plane * VEC;
    float* now = state + (i & 1) * plane * VEC;
    __syncthreads();
#pragma unroll
    for (int p = 0; p < POS; p++)
      if (works[p]) {
        const int index = p * line_slots + walk.slot;  // of position j - 1: the line starts with an empty position
        float left[VEC], right[VEC], out[VEC];
        state_get(before, plane, index, left);
        state_get(before, plane, index + 2 * s.lanes, right);
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          float sum = drive[p][k];
          if (!restart) sum += w[p][0][k] * left[k] + w[p][1][k] * h[p][k] + w[p][2][k] * right[k];
          if (MASKED && !(bits[p] & 8)) sum = 0.f;
          h[p][k] = sum;
          out[k] = NORMALISE ? (MASKED && !(bits[p] & 8) ? 0.f : get(gate[p], k) * sum) : sum;
        }
        state_put(now, plane, index + s.lanes, h[p]);
        const i64 jump = p * s.rows;
        if constexpr (MERGE)
          store_plane(y + jump * walk.across(a.y), pack(out));
        else
          store(y + jump * walk.across(a.y), pack(out));
        if constexpr (SAVE) store(saved + jump * walk.across(a.h), pack(h[p]));
      }
    y += y_step;
    saved += h_step;
    mask += mask_step;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  merge_planes(s, walk, a.y, a.out);
}
