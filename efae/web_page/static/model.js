// A model: its ONNX programs, verified; the group's action; the sampler. Arrays are
// {data: Float32Array, shape: [channels, rows, columns]}.
"use strict";

// Mirrors first, then turns counter-clockwise, as in Python.
function turn(element, { data, shape: [channels, rows, columns] }) {
  const isOdd = element.quarter_turns % 2;
  const [height, width] = isOdd ? [columns, rows] : [rows, columns];
  const turned = new Float32Array(data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let [row, column] = [
        [y, x], [x, columns - 1 - y], [rows - 1 - y, columns - 1 - x], [rows - 1 - x, y],
      ][element.quarter_turns];
      if (element.mirrored) column = columns - 1 - column;
      for (let c = 0; c < channels; c++) {
        turned[(c * height + y) * width + x] = data[(c * rows + row) * columns + column];
      }
    }
  }
  return { data: turned, shape: [channels, height, width] };
}

function act(element, latent) {
  const moved = turn(element, latent);
  const [channels, height, width] = moved.shape;
  const size = height * width;
  const data = new Float32Array(moved.data.length);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < size; i++) {
      data[c * size + i] = element.sign[c] * moved.data[element.source[c] * size + i];
    }
  }
  return { data, shape: moved.shape };
}

// Standard normal numbers, the same in every browser: mulberry32, then Box and Muller.
function drawNoise(shape) {
  let state = 1;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return (((z ^ (z >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  const data = new Float32Array(shape[0] * shape[1] * shape[2]);
  for (let i = 0; i < data.length; i++) {
    data[i] = Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  }
  return { data, shape };
}

const clip = (value) => Math.min(1, Math.max(-1, value));

function measurePsnr(a, b) {
  let sum = 0;
  for (let i = 0; i < a.data.length; i++) sum += (clip(a.data[i]) - clip(b.data[i])) ** 2;
  return 10 * Math.log10(4 / (sum / a.data.length + 1e-12));
}

function measureLargest(a, b) {
  let largest = 0;
  for (let i = 0; i < a.data.length; i++) {
    largest = Math.max(largest, Math.abs(clip(a.data[i]) - clip(b.data[i])));
  }
  return largest * 127.5;
}

// ---- The sampler, as in efae/model/sampler.py

function listEvaluations({ method, power, shift }, steps) {
  const times = [...Array(steps + 1).keys()].map((i) => {
    const u = (1 - i / steps) ** power;
    return (shift * u) / (shift * u + (1 - u));
  });
  const found = [];
  for (let i = 0; i < steps; i++) {
    const [t, end] = [times[i], times[i + 1]];
    const span = end - t;
    if (method === "midpoint") {
      const middle = (t + end) / 2;
      found.push({ t, advance: 0, slope: 0, ahead: middle - t });
      found.push({ t: middle, advance: span, slope: 0, ahead: 0 });
    } else if (method === "heun" && end !== 0) {
      found.push({ t, advance: 0, slope: 0, ahead: span });
      found.push({ t: end, advance: span / 2, slope: span / 2, ahead: 0 });
    } else {
      found.push({ t, advance: span, slope: 0, ahead: 0 });
    }
  }
  return found;
}

const toTensor = ({ data, shape }) => new ort.Tensor("float32", data, [1, ...shape]);

function fromTensor({ data, dims }) {
  return { data, shape: dims.slice(1) };
}

async function runProgram(session, inputs) {
  const { output } = await session.run(inputs);
  return fromTensor(output);
}

async function decode(model, latent, noise, steps) {
  const given = toTensor(latent);
  if (!model.facts.sampler) return runProgram(model.decode, { latent: given });
  const x = Float32Array.from(noise.data);
  let [y, before] = [Float32Array.from(x), new Float32Array(x.length)];
  for (const each of listEvaluations(model.facts.sampler, steps)) {
    const t = new ort.Tensor("float32", [each.t], [1]);
    const x_t = toTensor({ data: y, shape: noise.shape });
    const velocity = (await runProgram(model.velocity, { x_t, t, latent: given })).data;
    y = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) {
      x[i] += each.advance * velocity[i] + each.slope * before[i];
      y[i] = x[i] + each.ahead * velocity[i];
    }
    before = velocity;
  }
  return { data: x, shape: noise.shape };
}

// ---- Loading

async function read(path) {
  let answer;
  try {
    answer = await fetch(path);
  } catch {
    throw new Error(`${path} cannot be loaded: is the server still running?`);
  }
  if (!answer.ok) {
    throw new Error(`${path} is missing from this page's folder: build the page again.`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

async function readVerified(path, { bytes, sha256 }) {
  const data = await read(path);
  let isWhole = data.length === bytes;
  if (isWhole && crypto.subtle) { // absent outside https and localhost
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    isWhole = sha256 === [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }
  if (!isWhole) throw new Error(`${path} is damaged: build or copy the page's folder again.`);
  return data;
}

const readJson = (data) => JSON.parse(new TextDecoder().decode(data));

async function loadModel({ name, folder, manifest }, provider) {
  const facts = readJson(await readVerified(`${folder}/export.json`, manifest));
  const options = { logSeverityLevel: 3, executionProviders: [...new Set([provider, "wasm"])] };
  const open = async (program) => ort.InferenceSession.create(
    await readVerified(`${folder}/${program}`, facts.files[program]), options,
  );
  const model = { name, facts, encode: await open("encode.onnx") };
  const decoder = facts.sampler ? "velocity" : "decode";
  model[decoder] = await open(`${decoder}.onnx`);
  return model;
}

// A software adapter would be slower than WebAssembly.
async function hasGpu() {
  try {
    const adapter = await navigator.gpu.requestAdapter();
    return !adapter.info.isFallbackAdapter;
  } catch {
    return false;
  }
}

function hasSimd() { // i8x16.splat, in the smallest module that holds it
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array([
    0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253,
    15, 253, 98, 11,
  ]));
}
