// Fills the heat maps of `cgspn show`. The state is in the address: #photo-2/patch=31,40/scale=own/point=1/layer=5,
// so that a view can be passed on. HEAT, the colours from least to most, is set before this script.
"use strict";

const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((c, k) => Math.round(255 * (c + (place - low) * (HEAT[low + 1][k] - c))));
});
const STRENGTH = 0.8; // opacity of the most; photographs stay visible under it
document.documentElement.style.setProperty("--heat", HEAT.map((c) => `rgb(${c.map((v) => 255 * v).join(" ")})`).join());

const settings = { scale: "shared", layer: 0 }; // of the whole page
const views = new Map(); // by id of the section

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

class View {
  constructor(section, meta, buffer) {
    this.section = section;
    this.meta = meta;
    [this.rows, this.columns] = meta.cells;
    this.cell = meta.points[0];
    this.point = 0;
    const count = this.rows * this.columns;
    let start = 0;
    for (const model of meta.models) {
      model.codes = new Int8Array(buffer, start, count * model.steps.length);
      start += model.codes.length;
      model.lengths = lengths(model, count);
    }
    for (const layer of meta.layers) {
      for (const flow of layer.flows) {
        flow.maps = meta.points.map((_, i) => new Uint8Array(buffer, start + i * count, count));
        start += count * meta.points.length;
      }
    }
    const photograph = section.querySelector(".maps img");
    for (const stage of section.querySelectorAll(".stage")) {
      const image = stage.querySelector("img"), canvas = stage.querySelector("canvas");
      image.src = photograph.src; // one copy of the photograph in the file serves all
      image.classList.toggle("smooth", photograph.classList.contains("smooth"));
      [canvas.width, canvas.height] = [this.columns, this.rows];
      stage.style.setProperty("--cell", `${170 / this.columns}%`);
      if (stage.classList.contains("active")) this.listen(stage);
    }
    for (const button of section.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", () => this.choose(button.dataset.choice, button.dataset.value));
    }
    section.querySelector(".live").hidden = false;
  }

  listen(stage) {
    const under = (event) => {
      const box = stage.getBoundingClientRect();
      const share = (at, from, size, n) => Math.min(n - 1, Math.max(0, Math.floor(((at - from) / size) * n)));
      return [share(event.clientY, box.top, box.height, this.rows), share(event.clientX, box.left, box.width, this.columns)];
    };
    stage.addEventListener("click", (event) => this.select(under(event)));
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") this.read(under(event));
    });
    stage.addEventListener("pointerleave", () => this.read(null));
    stage.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const many = event.shiftKey ? 5 : 1;
      this.select([this.cell[0] + many * step[0], this.cell[1] + many * step[1]]);
    });
  }

  select([row, column]) {
    this.cell = [Math.min(this.rows - 1, Math.max(0, row)), Math.min(this.columns - 1, Math.max(0, column))];
    this.drawHeat();
    this.remember();
  }

  choose(name, value) {
    if (name === "point") {
      this.point = Number(value);
      this.drawFlows();
    } else {
      settings[name] = name === "layer" ? Number(value) : value;
      views.forEach((view) => view.draw());
    }
    this.remember();
  }

  remember() {
    const state = `patch=${this.cell}/scale=${settings.scale}/point=${this.point}/layer=${settings.layer}`;
    history.replaceState(null, "", `#${this.section.id}/${state}`);
  }

  draw() {
    this.drawHeat();
    this.drawFlows();
  }

  drawHeat() {
    const maps = this.meta.models.map((model) => cosines(model, this.cell[0] * this.columns + this.cell[1]));
    const lows = maps.map((map) => map.reduce((a, b) => Math.min(a, b)));
    const low = Math.min(...lows);
    this.meta.models.forEach((model, i) => {
      const from = settings.scale === "own" ? lows[i] : low;
      const figure = this.section.querySelector(`[data-model="${model.name}"]`);
      paint(figure, maps[i].map((v) => (255 * (v - from)) / Math.max(1e-6, 1 - from)), this.cell, this.meta.cells);
      figure.querySelector(".range").innerHTML = `cosine ${signed(from)}<i></i>1`;
    });
    this.maps = maps;
    this.press("scale", settings.scale);
    this.read(null);
  }

  read(over) {
    const [row, column] = over || this.cell;
    const values = this.meta.models.map((m, i) => `${m.name} ${signed(this.maps[i][row * this.columns + column])}`);
    const chosen = `Patch in row ${this.cell[0] + 1}, column ${this.cell[1] + 1}.`;
    const agree = this.maps.length > 1 ? ` The two maps correlate at ${signed(correlation(...this.maps))}.` : "";
    const text = over ? `${chosen} With row ${row + 1}, column ${column + 1}: ${values.join(", ")}.` : chosen + agree;
    const readout = this.section.querySelector(".readout");
    readout.setAttribute("aria-live", over ? "off" : "polite");
    readout.textContent = text;
  }

  drawFlows() {
    const layer = this.meta.layers.find((l) => l.number === settings.layer);
    const shown = new Map(layer.flows.map((flow) => [flow.key, flow]));
    for (const figure of this.section.querySelectorAll("[data-flow]")) {
      const flow = shown.get(figure.dataset.flow);
      figure.hidden = !flow;
      if (!flow) continue;
      paint(figure, flow.maps[this.point], this.meta.points[this.point], this.meta.cells);
      const half = flow.halves[this.point];
      figure.querySelector(".half").textContent = half ? `half within ${half} patches` : "nothing from elsewhere";
    }
    this.press("point", this.point);
    this.press("layer", settings.layer);
  }

  press(name, value) {
    for (const button of this.section.querySelectorAll(`[data-choice="${name}"]`)) {
      button.setAttribute("aria-pressed", String(button.dataset.value === String(value)));
    }
  }
}

function lengths({ codes, steps }, count) {
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (let d = 0; d < steps.length; d++) sum += (codes[i * steps.length + d] * steps[d]) ** 2;
    out[i] = Math.sqrt(sum) || 1;
  }
  return out;
}

function cosines({ codes, steps, lengths }, chosen) {
  const n = steps.length;
  const weights = steps.map((step, d) => codes[chosen * n + d] * step * step);
  return lengths.map((length, i) => {
    let sum = 0;
    for (let d = 0; d < n; d++) sum += codes[i * n + d] * weights[d];
    return sum / (length * lengths[chosen]);
  });
}

function paint(figure, values, [row, column], [rows, columns]) {
  const context = figure.querySelector("canvas").getContext("2d");
  const image = context.createImageData(columns, rows);
  values.forEach((value, i) => {
    const share = Math.min(255, Math.max(0, Math.round(value)));
    image.data.set(COLOURS[share], 4 * i);
    image.data[4 * i + 3] = Math.round(STRENGTH * share);
  });
  context.putImageData(image, 0, 0);
  const ring = figure.querySelector(".ring");
  ring.style.top = `${(100 * (row + 0.5)) / rows}%`;
  ring.style.left = `${(100 * (column + 0.5)) / columns}%`;
}

function correlation(a, b) {
  const mean = (x) => x.reduce((s, v) => s + v, 0) / x.length;
  const [ma, mb] = [mean(a), mean(b)];
  let ab = 0, aa = 0, bb = 0;
  a.forEach((v, i) => {
    ab += (v - ma) * (b[i] - mb);
    aa += (v - ma) ** 2;
    bb += (b[i] - mb) ** 2;
  });
  return aa * bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
}

function signed(value) {
  return value.toFixed(2).replace("-", "−");
}

function restore() {
  // some programs escape the commas of an address that is passed on
  const [id, ...parts] = location.hash.slice(1).replaceAll("%2C", ",").replaceAll("%3D", "=").split("/");
  const view = views.get(id);
  if (!view) return;
  view.section.querySelector(".live").open = true;
  if (!parts.length) return;
  const given = Object.fromEntries(parts.map((part) => part.split("=")));
  const cell = (given.patch || "").split(",").map(Number);
  if (cell.length === 2 && cell.every(Number.isInteger)) {
    view.cell = cell.map((v, i) => Math.min(view.meta.cells[i] - 1, Math.max(0, v)));
  }
  if (view.meta.points[given.point]) view.point = Number(given.point);
  if (view.meta.layers.some((l) => String(l.number) === given.layer)) settings.layer = Number(given.layer);
  if (given.scale === "own" || given.scale === "shared") settings.scale = given.scale;
  views.forEach((each) => each.draw());
  view.section.scrollIntoView({ behavior: "instant" });
}

(async () => {
  for (const script of document.querySelectorAll('section script[type="application/json"]')) {
    const section = script.closest("section"), meta = JSON.parse(script.textContent);
    const view = new View(section, meta, await inflate(meta.data));
    settings.layer ||= meta.layers[Math.floor((meta.layers.length - 1) / 2)].number;
    views.set(section.id, view);
    view.draw();
  }
  restore();
  addEventListener("hashchange", restore);
  document.documentElement.dataset.ready = "true"; // for tests
})();
