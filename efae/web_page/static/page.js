// The page: pictures in, pictures and numbers out. model.js computes.
"use strict";

const TITLES = {
  identity: "as it is", rot90: "turn left", rot180: "half turn", rot270: "turn right",
  flip_h: "mirror ↔", flip_v: "mirror ↕", transpose: "transpose ⤡", anti_transpose: "transpose ⤢",
};
const STEPS = [1, 2, 4, 8, 16];
const LONGEST = 256; // pixels of the longer side that models for any size are given
const LEAST_SIDE = 8; // smaller pictures show nothing
const page = { models: [], element: "identity", steps: null, picture: null, run: 0, done: 0 };
window.efaePage = page; // for tests

const find = (id) => document.getElementById(id);

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, isFault) {
  find("status").textContent = text;
  find("status").className = isFault ? "fault" : "";
}

// ---- Pictures

// Crops and scales to a size that the model takes; on white where the picture is transparent.
function fit(bitmap, facts) {
  const [channels, height, width] = facts.image_shape;
  let size = [height, width];
  if (facts.least_cells !== null) {
    const cell = facts.pixels_per_cell;
    const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
    const side = (pixels) => Math.max(facts.least_cells, Math.floor((pixels * scale) / cell)) * cell;
    size = [side(bitmap.height), side(bitmap.width)];
  }
  const canvas = make("canvas", { width: size[1], height: size[0] });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size[1], size[0]);
  context.imageSmoothingQuality = "high";
  const zoom = Math.max(size[1] / bitmap.width, size[0] / bitmap.height);
  const [w, h] = [size[1] / zoom, size[0] / zoom];
  const [left, top] = [(bitmap.width - w) / 2, (bitmap.height - h) / 2];
  context.drawImage(bitmap, left, top, w, h, 0, 0, size[1], size[0]);
  const pixels = context.getImageData(0, 0, size[1], size[0]).data;
  const count = size[0] * size[1];
  const data = new Float32Array(channels * count);
  for (let i = 0; i < count; i++) {
    const [r, g, b] = [0, 1, 2].map((c) => pixels[4 * i + c] / 127.5 - 1);
    if (channels === 1) data[i] = 0.299 * r + 0.587 * g + 0.114 * b;
    else [data[i], data[count + i], data[2 * count + i]] = [r, g, b];
  }
  return { data, shape: [channels, ...size] };
}

function draw(canvas, { data, shape: [channels, height, width] }) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  const count = height * width;
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) {
      const value = data[Math.min(c, channels - 1) * count + i];
      image.data[4 * i + c] = Math.round((clip(value) + 1) * 127.5);
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The first three channels of each irrep as colours; unit scale, so three deviations are white.
function drawLatent(model, latent) {
  const count = latent.shape[1] * latent.shape[2];
  let first = 0;
  for (const [irrep, copies] of Object.entries(model.facts.representation)) {
    const channels = copies * (irrep === "e" ? 2 : 1);
    if (!channels) continue;
    const data = latent.data.slice(first * count, (first + Math.min(3, channels)) * count);
    draw(model.latents[irrep], {
      data: data.map((value) => value / 3),
      shape: [Math.min(3, channels), latent.shape[1], latent.shape[2]],
    });
    first += channels;
  }
}

// ---- One model on the page

function addFigure(parent, caption, alt) {
  const canvas = make("canvas", { width: 8, height: 8 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", alt);
  parent.append(make("figure", {}, canvas, make("figcaption", { textContent: caption })));
  return canvas;
}

function addPanel(model) {
  const pictures = make("div", { className: "pictures" });
  model.canvases = {
    image: addFigure(pictures, "picture", "The picture, as the model receives it"),
    restored: addFigure(pictures, "decode of its latent", "Decode of the latent as it is"),
  };
  const latent = make("div", { className: "latent" });
  model.latents = {};
  for (const [irrep, copies] of Object.entries(model.facts.representation)) {
    const name = irrep.toUpperCase();
    if (copies) model.latents[irrep] = addFigure(latent, name, `Channels ${name} of the latent`);
  }
  pictures.append(make("figure", {}, latent, make("figcaption", { textContent: "turned latent" })));
  Object.assign(model.canvases, {
    decoded: addFigure(pictures, "decode of the turned latent", "Decode of the turned latent"),
    target: addFigure(pictures, "turned picture", "The picture, turned"),
    difference: addFigure(pictures, "difference of the two, ×\u00a04", "Difference, four times enlarged"),
  });
  model.numbers = make("ul", { className: "numbers" });
  const heading = make("h2", { textContent: model.name });
  find("models").append(make("section", {}, heading, pictures, model.numbers));
  model.numbers.setAttribute("aria-label", `Numbers of ${model.name}`);
}

const showSmall = (value) => (value < 0.05 ? value.toExponential(0) : value.toFixed(1));

function showNumbers(model, found) {
  const rows = [
    ["PSNR", `${found.psnr.toFixed(2)} dB`],
    ["loss by turning", `${Math.max(0, found.loss).toFixed(2)} dB`],
    ["change by turning", `${showSmall(found.largest)} grey levels`],
    ["time", `${Math.round(found.milliseconds)} ms`],
  ];
  model.numbers.replaceChildren(
    ...rows.map(([name, value]) => make("li", {}, `${name} `, make("b", { textContent: value }))),
  );
}

async function encodePicture(model, picture) {
  const image = fit(picture, model.facts);
  const noise = drawNoise(image.shape);
  const latent = await runProgram(model.encode, { image: toTensor(image) });
  if (picture !== page.picture) return;
  Object.assign(model, { image, noise, latent, restored: null });
  draw(model.canvases.image, image);
}

async function show(model, run) {
  const { image, noise, latent } = model;
  const element = model.facts.elements[page.element];
  if (!model.restored || model.restoredSteps !== page.steps) {
    const steps = page.steps;
    const restored = await decode(model, latent, noise, steps);
    if (run !== page.run) return;
    Object.assign(model, { restored, restoredSteps: steps });
    draw(model.canvases.restored, restored);
  }
  const acted = act(element, latent);
  const started = performance.now();
  const decoded = await decode(model, acted, turn(element, noise), page.steps);
  const milliseconds = performance.now() - started;
  if (run !== page.run) return;
  const [target, expected] = [turn(element, image), turn(element, model.restored)];
  const psnr = measurePsnr(decoded, target);
  model.found = {
    psnr,
    loss: measurePsnr(model.restored, image) - psnr,
    largest: measureLargest(decoded, expected),
    milliseconds,
    acted,
    decoded,
  };
  drawLatent(model, acted);
  draw(model.canvases.decoded, decoded);
  draw(model.canvases.target, target);
  draw(model.canvases.difference, {
    data: decoded.data.map((value, i) => 4 * Math.abs(clip(value) - clip(target.data[i])) - 1),
    shape: decoded.shape,
  });
  showNumbers(model, model.found);
}

// Runs the newest request only; ONNX Runtime computes one program at a time.
let last = Promise.resolve();
function update(isNewPicture) {
  const run = ++page.run;
  if (isNewPicture) page.models.forEach((model) => (model.image = null));
  last = last.then(() => compute(run)).catch(async (error) => {
    if (page.provider === "wasm") throw error;
    // On the CPU from now on: a GPU may lack memory, or be reset.
    const loaded = await loadModels("wasm");
    page.models.forEach((model, i) => Object.assign(model, loaded[i]));
    await compute(run);
  }).catch((error) => say(`The model failed: ${error.message}`, true));
  return last;
}

async function compute(run) {
  for (const model of page.models) {
    if (run !== page.run || !page.picture) return;
    if (!model.image) await encodePicture(model, page.picture);
    if (run !== page.run) return;
    await show(model, run);
  }
  if (run === page.run) page.done = run;
}

// ---- Input

async function open(blob, name) {
  if (!page.models.length) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    say(`${name} is no picture that this browser can read: use a PNG, JPEG or WebP file.`, true);
    return;
  }
  if (Math.min(bitmap.width, bitmap.height) < LEAST_SIDE) {
    const size = `${bitmap.width} × ${bitmap.height}`;
    say(`${name} has ${size} pixels: use a picture of ${LEAST_SIDE} or more on each side.`, true);
    return;
  }
  page.picture = bitmap;
  say(`Computing with ${name} …`);
  await update(true);
  const model = page.models[0];
  if (!model.image || page.picture !== bitmap) return;
  const [, height, width] = model.image.shape;
  if (!find("status").classList.contains("fault")) {
    const fitted = bitmap.width !== width || bitmap.height !== height;
    say(`${name}: ${bitmap.width} × ${bitmap.height} pixels` +
      (fitted ? `, scaled and cropped to ${width} × ${height} for the model.` : "."));
  }
}

async function openSample({ file, title }) {
  const answer = await fetch(`samples/${file}`);
  await open(await answer.blob(), title);
}

function choose(name) {
  page.element = name;
  for (const button of find("elements").children) {
    button.setAttribute("aria-pressed", String(button.dataset.element === name));
  }
  return update(false);
}

function listen() {
  find("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) open(file, file.name);
    event.target.value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    find("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => find("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    find("drop").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) open(file, file.name);
    else say("That is no file: drop a picture from your computer.", true);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) open(file, "The pasted picture");
    else say("The clipboard holds no picture.", true);
  });
  find("steps").addEventListener("change", (event) => {
    page.steps = Number(event.target.value);
    update(false);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === find("steps")) return;
    const button = find("elements").children[Number(event.key) - 1];
    const step = { "+": 1, "-": -1 }[event.key];
    if (button) choose(button.dataset.element);
    const option = step && find("steps").options[find("steps").selectedIndex + step];
    if (option) {
      option.selected = true;
      find("steps").dispatchEvent(new Event("change"));
    }
  });
}

// ---- Loading

function loadRuntime(provider) {
  return new Promise((resolve, reject) => {
    const file = `runtime/ort.${provider}.min.js`;
    const script = make("script", { src: file });
    script.onload = resolve;
    script.onerror = () => reject(new Error(`${file} is missing: build the page again.`));
    document.head.append(script);
  });
}

async function loadModels(provider) {
  page.provider = provider;
  await loadRuntime(provider);
  Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: new URL("runtime/", location.href).href });
  const models = [];
  for (const entry of page.settings.models) models.push(await loadModel(entry, provider));
  return models;
}

async function start() {
  if (location.protocol === "file:") {
    throw new Error("Browsers let no page read its models from file://: serve this folder, for" +
      " example with “python -m http.server”, and open the address that it prints.");
  }
  if (!hasSimd()) {
    throw new Error("This browser has no WebAssembly with SIMD, which the model needs: use a" +
      " version of Chrome, Edge, Firefox or Safari from 2023 or later.");
  }
  const settings = page.settings = readJson(await read("page.json"));
  find("credit").textContent = settings.credit;
  if (settings.webgpu && await hasGpu()) {
    page.models = await loadModels("webgpu").catch(() => []);
  }
  if (!page.models.length) page.models = await loadModels("wasm");
  page.models.forEach(addPanel);
  const shared = Object.keys(page.models[0].facts.elements).filter((name) =>
    page.models.every((model) => name in model.facts.elements));
  find("elements").append(...shared.map((name, i) => {
    const button = make("button", { type: "button", textContent: `${i + 1}  ${TITLES[name]}` });
    button.dataset.element = name;
    button.setAttribute("aria-pressed", String(name === "identity"));
    button.addEventListener("click", () => choose(name));
    return button;
  }));
  const flow = page.models.find((model) => model.facts.sampler);
  find("steps-label").hidden = !flow;
  page.steps = flow ? flow.facts.sampler.steps : 1;
  const counts = [...new Set([...STEPS, page.steps])].sort((a, b) => a - b);
  find("steps").append(...counts.map((count) =>
    make("option", { value: count, textContent: count, selected: count === page.steps })));
  find("samples").append(...settings.samples.map((sample) => {
    const image = make("img", { src: `samples/${sample.file}`, alt: sample.title });
    const button = make("button", { type: "button", title: sample.title }, image);
    button.addEventListener("click", () => openSample(sample));
    return button;
  }));
  listen();
  await openSample(settings.samples[0]);
}

start().catch((error) => say(error.message, true));
