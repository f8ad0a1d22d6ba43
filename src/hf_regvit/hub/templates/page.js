// Runs the exported model of this folder on an image and draws norms, attention and PCA of its patches. With
// `?other=FOLDER` in the address, the model of another export, a folder on the same host, is shown below. With
// `?image=FILE`, an image on the same host is shown at once.

import * as ort from './runtime/ort.wasm.min.mjs';

ort.env.wasm.wasmPaths = new URL('runtime/', import.meta.url).href;
ort.env.wasm.numThreads = 1;  // several threads need headers that static hosts do not send
ort.env.logLevel = 'error';

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const MARK = '#ff7a1a';
const OUTLIER = 2;  // times the median norm of the image
const MOST_REGISTERS = 8;  // in the figures
const element = (id) => document.getElementById(id);
const say = (text, failed = false) => {
  element('status').textContent = text;
  element('status').classList.toggle('error', failed);
};

// ---- Model ----------------------------------------------------------------------------------------------------------

async function load(folder) {
  const response = await fetch(new URL('proof.json', folder));
  if (!response.ok) throw new Error(`There is no export at ${folder.pathname}.`);
  const proof = await response.json();
  if (!proof.outputs.norms) throw new Error(`${folder.pathname} was not exported with --format web.`);
  const options = {executionProviders: ['wasm']};
  const data = proof.files.find((one) => one.file === 'onnx/model.onnx').sha256['onnx/model.onnx.data'];
  if (data) options.externalData = [{path: 'model.onnx.data', data: new URL('onnx/model.onnx.data', folder).href}];
  const session = await ort.InferenceSession.create(new URL('onnx/model.onnx', folder).href, options);
  return {proof, session};
}

function title({source}) {
  const registers = source.registers === 1 ? '1 register' : `${source.registers || 'no'} registers`;
  return registers + (source.register_neurons ? ' at test time' : '');
}

// Resizes and crops an image as `preprocess` in run.py; the browser's resampling differs from Pillow's by some gray levels.
function pixelsOf(bitmap, {preprocessing: {resize, crop}, size: [rows, columns]}) {
  let [width, height] = [bitmap.width, bitmap.height];
  if (resize?.shortest_edge) {
    const edge = resize.shortest_edge, short = Math.min(width, height), scale = edge / short;
    [width, height] = [width, height].map((side) => side === short ? edge : Math.trunc(scale * side));
  } else if (resize) [width, height] = [resize.width, resize.height];
  const [top, left] = crop ? [height - crop[0], width - crop[1]].map((v) => Math.max(0, Math.floor(v / 2))) : [0, 0];
  if (height - top < rows || width - left < columns || (!crop && (height !== rows || width !== columns)))
    throw new Error(`The image has ${height} x ${width} pixels, but the model takes ${rows} x ${columns}.`);
  const canvas = Object.assign(document.createElement('canvas'), {width: columns, height: rows});
  const context = canvas.getContext('2d', {alpha: false, willReadFrequently: true});
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, -left, -top, width, height);
  return {canvas, levels: context.getImageData(0, 0, columns, rows).data};  // RGBA
}

function inputOf(levels, {input, size: [rows, columns], preprocessing: {scale, mean, std}}) {
  const count = rows * columns, bytes = input.dtype === 'uint8';
  const values = bytes ? new Uint8Array(3 * count) : new Float32Array(3 * count);
  for (let i = 0; i < count; i++) for (let c = 0; c < 3; c++) {
    if (bytes) values[3 * i + c] = levels[4 * i + c];
    else values[c * count + i] = (levels[4 * i + c] * scale - mean[c]) / std[c];
  }
  return new ort.Tensor(input.dtype, values, bytes ? [1, rows, columns, 3] : [1, 3, rows, columns]);
}

async function look({proof, session}, bitmap) {
  const {canvas, levels} = pixelsOf(bitmap, proof), started = performance.now();
  const outputs = await session.run({[proof.input.name]: inputOf(levels, proof)});
  const seconds = (performance.now() - started) / 1000;
  const [, tokens, patches] = outputs.attention.dims, all = outputs.attention.data;
  const norms = Array.from(outputs.norms.data), cutoff = OUTLIER * quantile(norms, 0.5);
  return {
    proof, canvas, seconds, norms, cutoff, outliers: norms.flatMap((norm, place) => norm > cutoff ? [place] : []),
    grid: proof.size.map((side, axis) => side / proof.patch[axis]),
    attention: Array.from({length: tokens}, (_, t) => Array.from(all.slice(t * patches, (t + 1) * patches))),
    components: principalComponents(outputs.patches.data, patches, outputs.patches.dims[2]),
    cls: proof.outputs.cls ? Array.from(outputs.cls.data) : null,
  };
}

// ---- Numbers --------------------------------------------------------------------------------------------------------

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort(), place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };

// First three principal components of tokens (count x width), as three arrays of length `count`: subspace iteration with
// some more directions than needed, then the eigenvectors within the subspace.
function principalComponents(tokens, count, width, wanted = 3) {
  const rows = Array.from({length: count}, (_, i) => Float64Array.from(tokens.subarray(i * width, (i + 1) * width)));
  for (let d = 0; d < width; d++) {
    let mean = 0;
    for (const row of rows) mean += row[d] / count;
    for (const row of rows) row[d] -= mean;
  }
  const size = Math.min(wanted + 7, count, width);
  let seed = 1;
  const random = () => (seed = seed * 16807 % 2147483647) / 2147483647 - 0.5;
  let basis = orthonormal(Array.from({length: size}, () => Float64Array.from({length: width}, random)));
  const projected = (vector) => Float64Array.from(rows, (row) => dot(row, vector));
  for (let step = 0; step < 30; step++) basis = orthonormal(basis.map((vector) => {
    const next = new Float64Array(width), weights = projected(vector);
    rows.forEach((row, i) => { for (let d = 0; d < width; d++) next[d] += weights[i] * row[d]; });
    return next;
  }));
  const parts = basis.map(projected), gram = parts.map((a) => Float64Array.from(parts, (b) => dot(a, b)));
  return eigenvectors(gram).slice(0, wanted).map((mix) => Array.from({length: count}, (_, i) =>
    mix.reduce((sum, weight, k) => sum + weight * parts[k][i], 0)));
}

function orthonormal(vectors) {
  vectors.forEach((vector, k) => {
    for (let pass = 0; pass < 2; pass++) for (const other of vectors.slice(0, k)) {
      const along = dot(vector, other);
      for (let d = 0; d < vector.length; d++) vector[d] -= along * other[d];
    }
    const length = Math.sqrt(dot(vector, vector)) || 1;
    for (let d = 0; d < vector.length; d++) vector[d] /= length;
  });
  return vectors;
}

// Eigenvectors of a small symmetric matrix by Jacobi rotations, the largest eigenvalue first.
function eigenvectors(matrix) {
  const n = matrix.length, vectors = matrix.map((_, i) => Float64Array.from({length: n}, (_, j) => +(i === j)));
  for (let sweep = 0; sweep < 30; sweep++) for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
    if (Math.abs(matrix[p][q]) < 1e-300) continue;
    const angle = 0.5 * Math.atan2(2 * matrix[p][q], matrix[p][p] - matrix[q][q]);
    const c = Math.cos(angle), s = Math.sin(angle);
    for (const row of matrix) [row[p], row[q]] = [c * row[p] + s * row[q], c * row[q] - s * row[p]];
    for (let k = 0; k < n; k++)
      [matrix[p][k], matrix[q][k]] = [c * matrix[p][k] + s * matrix[q][k], c * matrix[q][k] - s * matrix[p][k]];
    for (const row of vectors) [row[p], row[q]] = [c * row[p] + s * row[q], c * row[q] - s * row[p]];
  }
  const order = matrix.map((_, i) => i).sort((a, b) => matrix[b][b] - matrix[a][a]);
  return order.map((column) => vectors.map((row) => row[column]));
}

// ---- Figures --------------------------------------------------------------------------------------------------------

function viridis(value) {
  const place = 4 * Math.min(Math.max(value, 0), 1), low = Math.min(Math.floor(place), 3);
  return VIRIDIS[low].map((channel, c) => Math.round(channel + (place - low) * (VIRIDIS[low + 1][c] - channel)));
}

function scaled(values, low, high) { return values.map((value) => (value - low) / Math.max(high - low, 1e-12)); }

function drawMap([rows, columns], colors, marked = []) {
  const cell = Math.max(2, Math.round(448 / Math.max(rows, columns)));
  const canvas = Object.assign(document.createElement('canvas'), {width: columns * cell, height: rows * cell});
  const context = canvas.getContext('2d');
  colors.forEach((color, place) => {
    context.fillStyle = `rgb(${color.join(' ')})`;
    context.fillRect(place % columns * cell, Math.floor(place / columns) * cell, cell, cell);
  });
  const line = Math.max(1, Math.min(4, cell / 5));
  Object.assign(context, {strokeStyle: MARK, lineWidth: line});
  for (const place of marked) context.strokeRect(
    place % columns * cell + line / 2, Math.floor(place / columns) * cell + line / 2, cell - line, cell - line);
  return canvas;
}

function figure(canvas, name, detail = '') {
  const [made, caption, small] = ['figure', 'figcaption', 'small'].map((tag) => document.createElement(tag));
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', `${name}. ${detail}`);
  small.textContent = detail;
  caption.append(name, small);
  made.append(canvas, caption);
  return made;
}

function show(found, name, [low, high]) {
  const {proof, grid, norms, outliers, attention, components} = found;
  const [section, heading, maps] = ['section', 'h2', 'div'].map((tag) => document.createElement(tag));
  heading.textContent = name;
  maps.className = 'maps';
  const count = outliers.length === 1 ? '1 outlier' : `${outliers.length} outliers`;
  const detail = `${Math.min(...norms).toFixed(1)} to ${Math.max(...norms).toFixed(1)}, ${count}`;
  const channels = components.map((values) => scaled(values, quantile(values, 0.01), quantile(values, 0.99)));
  const colors = norms.map((_, place) => [0, 1, 2].map((c) =>
    Math.round(255 * Math.min(Math.max(channels[c]?.[place] ?? 0, 0), 1))));
  maps.append(
    figure(found.canvas, 'Image', `${proof.size[0]} x ${proof.size[1]} pixels, ${grid[0]} x ${grid[1]} patches`),
    figure(drawMap(grid, scaled(norms, low, high).map(viridis), outliers), 'Patch norms', detail),
    figure(drawMap(grid, colors), 'PCA', '3 components of the patches'));
  const hasCls = found.cls !== null;
  attention.slice(0, hasCls + MOST_REGISTERS).forEach((weights, token) => {
    const label = hasCls && token === 0 ? 'Attention of CLS' : `Attention of register ${token + 1 - hasCls}`;
    const share = weights.reduce((sum, weight) => sum + weight, 0);
    const map = scaled(weights, Math.min(...weights), Math.max(...weights)).map(viridis);
    maps.append(figure(drawMap(grid, map), label, `${Math.round(100 * share)} % on patches`));
  });
  section.append(heading, maps);
  element('results').append(section);
}

// ---- Page -----------------------------------------------------------------------------------------------------------

let models = [], running = false;

async function start() {
  const folders = [new URL('./', location.href)];
  const [other, image] = ['other', 'image'].map((name) => new URLSearchParams(location.search).get(name));
  if (other) folders.push(new URL(other.replace(/\/*$/, '/'), folders[0]));
  if (folders.some((folder) => folder.origin !== location.origin)) throw new Error('The other export must be here, too.');
  for (const folder of folders) models.push(await load(folder));
  element('takes').textContent = `The image is resized and cropped to ${models[0].proof.size.join(' x ')} pixels.`;
  say('Ready');
  if (!image) return;
  const response = await fetch(new URL(image, folders[0])).catch(() => ({ok: false}));
  if (!response.ok) throw new Error(`There is no image ${image} here.`);
  await open(await response.blob());
}

async function open(file) {
  if (!file || running || !models.length) return;
  running = true;
  say('Computing');
  try {
    const bitmap = await createImageBitmap(file, {colorSpaceConversion: 'none', premultiplyAlpha: 'none'})
      .catch(() => { throw new Error(`${file.name || 'The file'} is not an image that this browser can read.`); });
    await new Promise((done) => setTimeout(done, 30));  // the browser shows the message first
    const found = [];
    for (const model of models) found.push(await look(model, bitmap));
    const all = found.flatMap((one) => one.norms), range = [Math.min(...all), Math.max(...all)];
    element('results').replaceChildren();
    found.forEach((one, i) => {
      const name = title(one.proof);
      show(one, found.length > 1 ? `${['Before', 'After'][i]}: ${name}` : name, range);
    });
    window.found = found;
    say(`Computed in ${found.map((one) => one.seconds.toFixed(1)).join(' and ')} s, on one thread of this browser.`);
  } catch (error) {
    say(error.message, true);
  }
  running = false;
}

const drop = element('drop');
element('file').addEventListener('change', (event) => { open(event.target.files[0]); event.target.value = ''; });
document.addEventListener('dragover', (event) => { event.preventDefault(); drop.classList.add('over'); });
document.addEventListener('dragleave', () => drop.classList.remove('over'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  open(event.dataTransfer.files[0]);
});
start().catch((error) => say(error.message, true));
