// The Spectra tab: measured spectra beside their laws, step by step. TensorBoard imports this module and calls `render`.

import {commonAxis, number, value} from './axis.js';
import {make} from './dom.js';
import {followDarkMode, onReload} from './host.js';
import {horizontalRange, layOut, verticalRange, wantsLogarithm} from './layout.js';
import {fetchRuns, fetchSeries} from './model.js';
import {spectrumPicture} from './spectrum.js';
import {metricsOf, stripPicture} from './strip.js';

const COLOURS = ['#0077bb', '#ee7733', '#009988', '#cc3311', '#33bbee', '#ee3377', '#7a5fb5', '#8a8a2a'];
const MOST_AT_FIRST = 6;

const state = {
  index: {runs: {}, most_steps: 0},
  tag: null,
  chosen: null, // a set of runs; null until there are any
  known: new Set(), // runs that were there when last asked
  step: Infinity,
  scale: 'auto',
  height: 'auto',
  hold: 'horizontal',
  ghost: true,
  metric: null,
  logSteps: null, // null: where the steps themselves are spread so
  timer: null,
  lawOpen: false,
};

let shown = []; // [{run, colour, points, skipped}] of the tag and runs that are chosen
let common = {key: null};
const page = {};

export async function render() {
  document.documentElement.lang = 'en';
  document.title = 'Spectra';
  followDarkMode();
  const style = make('link', {rel: 'stylesheet', href: new URL('style.css', import.meta.url).href});
  const styled = new Promise((resolve) => {
    style.onload = style.onerror = resolve;
  });
  document.head.append(make('meta', {charset: 'utf-8'}), style);
  await styled;
  page.side = make('nav', {'aria-label': 'spectra and runs'});
  page.main = make('main');
  for (const part of ['words', 'history', 'pictures']) page[part] = make('div');
  page.stepper = makeStepper();
  document.body.append(page.side, page.main);
  document.addEventListener('keydown', onKey);
  window.addEventListener('resize', () => requestAnimationFrame(() => shown.length && paint()));
  onReload(refresh);
  await refresh();
}

/** Ask the server anew; keep what is chosen as far as it still exists. */
async function refresh() {
  try {
    state.index = await fetchRuns();
  } catch (error) {
    say('TensorBoard does not answer', [String(error.message || error)]);
    return;
  }
  const runs = runNames();
  if (!runs.length) {
    sayHowToBegin();
    return;
  }
  const tags = tagNames();
  if (!tags.some(([tag]) => tag === state.tag)) state.tag = tags[0][0];
  const choosable = runs.filter((run) => entry(run, state.tag));
  if (state.chosen === null) {
    state.chosen = new Set(choosable.slice(0, MOST_AT_FIRST));
  } else if (choosable.every((run) => state.chosen.has(run) || !state.known.has(run))) {
    // A run that has begun meanwhile joins the others where all of them are on show.
    const room = Math.max(0, MOST_AT_FIRST - state.chosen.size);
    choosable.filter((run) => !state.known.has(run)).slice(0, room).forEach((run) => state.chosen.add(run));
  }
  state.known = new Set(runs);
  for (const run of [...state.chosen]) if (!runs.includes(run)) state.chosen.delete(run);
  paintSide();
  await load();
}

/** Fetch the points of what is chosen, then paint. */
async function load() {
  const [tag, runs] = [state.tag, runNames().filter((run) => state.chosen.has(run) && entry(run, state.tag))];
  const colours = new Map(runNames().map((run, i) => [run, COLOURS[i % COLOURS.length]]));
  const answers = await Promise.allSettled(runs.map((run) => fetchSeries(run, tag, entry(run, tag).last_step)));
  if (tag !== state.tag || runs.some((run) => !state.chosen.has(run))) return; // the reader was faster
  shown = runs.map((run, i) => {
    const {value: answer, reason} = answers[i];
    return {run, colour: colours.get(run), points: answer ? answer.points : [], skipped: answer ? answer.skipped : 0,
      error: reason ? String(reason.message || reason) : null};
  });
  paint();
}

const runNames = () => Object.keys(state.index.runs).sort((a, b) => a.localeCompare(b, 'en', {numeric: true}));
const runText = (run) => run === '.' ? 'the log directory' : run;
const entry = (run, tag) => (state.index.runs[run] || []).find((known) => known.tag === tag);

function tagNames() {
  const names = new Map();
  for (const known of Object.values(state.index.runs)) for (const {tag, name} of known) names.set(tag, name);
  return [...names].sort((a, b) => a[1].localeCompare(b[1], 'en', {numeric: true}));
}

function steps() {
  return [...new Set(shown.flatMap(({points}) => points.map((point) => point.step)))].sort((a, b) => a - b);
}

/** The step that is on show: the chosen one or the last before it. */
function stepNow(all) {
  const before = all.filter((step) => step <= state.step);
  return before.length ? before.at(-1) : all[0];
}

function pointAt(points, step) {
  const before = points.filter((point) => point.step <= step);
  return before.length ? before.at(-1) : points[0];
}

// The side: what to look at.

function paintSide() {
  const names = tagNames();
  const tags = names.map(([tag, name]) => make('label', {class: 'choice', title: tag},
      make('input', {type: 'radio', name: 'tag', checked: tag === state.tag, onchange: () => {
        state.tag = tag;
        if (!runNames().some((run) => state.chosen.has(run) && entry(run, tag))) {
          runNames().filter((run) => entry(run, tag)).slice(0, MOST_AT_FIRST).forEach((run) => state.chosen.add(run));
        }
        paintSide();
        load();
      }}), make('span', {}, name)));
  const runs = runNames().map((run, i) => make('label', {class: entry(run, state.tag) ? 'choice' : 'choice absent',
    title: entry(run, state.tag) ? run : `${run} has no such spectrum`},
      make('input', {type: 'checkbox', checked: state.chosen.has(run), style: `accent-color:${COLOURS[i % COLOURS.length]}`,
        onchange: (event) => {
          if (event.target.checked) state.chosen.add(run);
          else state.chosen.delete(run);
          load();
        }}), make('span', {}, runText(run))));
  const all = make('button', {type: 'button', class: 'link', onclick: () => {
    const choosable = runNames().filter((run) => entry(run, state.tag));
    const every = choosable.every((run) => state.chosen.has(run));
    choosable.forEach((run) => every ? state.chosen.delete(run) : state.chosen.add(run));
    paintSide();
    load();
  }}, 'all / none');
  page.side.replaceChildren(
      make('h2', {}, 'Spectrum'), make('div', {class: 'list'}, ...tags),
      make('h2', {}, 'Runs', all), make('div', {class: 'list'}, ...runs),
      make('h2', {}, 'Axes'),
      select('Eigenvalues', 'scale', [['auto', 'automatic'], ['linear', 'linear'], ['log', 'logarithmic'], ['symlog', 'symmetric log']]),
      select('Heights', 'height', [['auto', 'automatic'], ['linear', 'linear'], ['log', 'logarithmic']]),
      select('Same over steps', 'hold', [['horizontal', 'eigenvalues'], ['both', 'eigenvalues and heights'], ['neither', 'neither']]),
      make('label', {class: 'choice'}, make('input', {type: 'checkbox', checked: state.ghost, onchange: (event) => {
        state.ghost = event.target.checked;
        paint();
      }}), make('span', {}, 'outline of the first step')),
      make('h2', {}, 'Legend'), legend());
}

function select(text, key, options) {
  return make('label', {class: 'field'}, make('span', {}, text),
      make('select', {onchange: (event) => {
        state[key] = event.target.value;
        paint();
      }}, ...options.map(([option, said]) => make('option', {value: option, selected: state[key] === option}, said))));
}

function legend() {
  const row = (kind, text) => make('li', {}, make('i', {class: kind}), text);
  return make('ul', {class: 'legend'},
      row('key-bar', 'measured'), row('key-law', 'predicted law'), row('key-atom', 'its point masses'),
      row('key-first', 'measured at the first step'), row('key-outlier', 'outliers beyond the law'));
}

// The middle: history, steps, pictures.

function paint() {
  const all = steps();
  if (!all.length) {
    page.main.replaceChildren(...shown.filter(({error}) => error).map(({run, error}) => note(`${run}: ${error}`)),
        make('p', {class: 'hint'}, shown.length ? 'Nothing readable in these runs.' : 'Choose a run on the left.'));
    return;
  }
  const now = stepNow(all);
  const notes = shown.filter(({error}) => error).map(({run, error}) => note(`${run}: ${error}`));
  for (const {run, skipped} of shown) {
    if (skipped) notes.push(note(`${run}: ${skipped} spectra were written by another version of torch_rmt and are left out.`));
  }
  if (shown.some(({points}) => state.index.most_steps && points.length >= state.index.most_steps)) {
    notes.push(note(`TensorBoard keeps ${state.index.most_steps} steps drawn at random; to keep all: ` +
        'tensorboard --samples_per_plugin torch_rmt_spectra=0'));
  }
  page.words.replaceChildren(...notes);
  page.history.replaceChildren(history(all, now));
  page.pictures.replaceChildren(pictures(now));
  updateStepper(all, now);
  if (page.words.parentNode !== page.main) {
    page.main.replaceChildren(page.words, page.history, page.stepper.whole, page.pictures);
  }
}

const note = (text) => make('p', {class: 'note', role: 'status'}, text);

function history(all, now) {
  const runs = shown.filter(({points}) => points.length);
  const metrics = metricsOf(runs.flatMap(({points}) => points));
  if (!metrics.length) return make('div');
  const metric = metrics.some(({key}) => key === state.metric) ? state.metric : metrics[0].key;
  const spread = all.length > 4 && all.at(-1) > 20 * (all[Math.floor(all.length / 2)] || 1);
  const logSteps = state.logSteps === null ? spread : state.logSteps;
  const chooser = make('select', {'aria-label': 'number in the history', onchange: (event) => {
    state.metric = event.target.value;
    paint();
  }}, ...metrics.map(({key, text}) => make('option', {value: key, selected: key === metric}, text)));
  const log = make('label', {class: 'inline'}, make('input', {type: 'checkbox', checked: logSteps, onchange: (event) => {
    state.logSteps = event.target.checked;
    paint();
  }}), 'logarithmic steps');
  return make('section', {class: 'card'},
      make('header', {}, chooser, log, make('span', {class: 'key'},
          make('i', {class: 'dot-key agrees'}), 'law holds', make('i', {class: 'dot-key departs'}), 'departs',
          make('i', {class: 'dot-key undecided'}), 'not decided')),
      stripPicture(runs, metric, now, logSteps, Math.max(page.main.clientWidth - 52, 300), go));
}

/** The slider and its buttons, made once: an element that is replaced while it is dragged stops moving. */
function makeStepper() {
  const button = (text, title, onclick) => make('button', {type: 'button', title, onclick}, text);
  const parts = {
    play: button('▶', 'play (space)', play),
    back: button('‹', 'step before (←)', () => move(-1)),
    on: button('›', 'next step (→)', () => move(1)),
    slider: make('input', {type: 'range', min: '0', 'aria-label': 'step', oninput: (event) => go(steps()[Number(event.target.value)])}),
    said: make('output'),
  };
  return {...parts, whole: make('div', {class: 'stepper'}, ...Object.values(parts))};
}

function updateStepper(all, now) {
  const at = all.indexOf(now);
  const {play: button, back, on, slider, said} = page.stepper;
  button.textContent = state.timer === null ? '▶' : '❚❚';
  button.title = state.timer === null ? 'play (space)' : 'pause (space)';
  back.disabled = at === 0;
  on.disabled = at === all.length - 1;
  slider.max = String(all.length - 1);
  slider.value = String(at);
  slider.setAttribute('aria-valuetext', `step ${now}`);
  said.replaceChildren(`step ${now.toLocaleString('en')}`, make('small', {}, `${at + 1} of ${all.length}`));
}

function go(step) {
  const all = steps();
  state.step = step === all.at(-1) ? Infinity : step; // at the end: stay at the end when more comes
  paint();
}

function move(by) {
  const all = steps();
  const to = all.indexOf(stepNow(all)) + by;
  if (to >= 0 && to < all.length) go(all[to]);
  return to < all.length - 1;
}

function play() {
  if (state.timer !== null) {
    clearInterval(state.timer);
    state.timer = null;
    paint();
    return;
  }
  const all = steps();
  if (stepNow(all) === all.at(-1)) state.step = all[0];
  state.timer = setInterval(() => {
    if (!move(1)) play();
  }, Math.max(60, Math.min(600, 9000 / all.length)));
  paint();
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA|BUTTON)$/.test(event.target.tagName)) return;
  if (!shown.length) return;
  if (event.key === 'ArrowRight') move(1);
  else if (event.key === 'ArrowLeft') move(-1);
  else if (event.key === ' ') play();
  else return;
  event.preventDefault();
}

/** All points laid out on their common axis, kept until points or axis change: {axis, of, range, logarithmic}. */
function commonLayout(points) {
  const key = JSON.stringify([state.tag, state.scale, shown.map(({run, points: of}) => [run, of.length, of.at(-1)?.step])]);
  if (common.key !== key) {
    const axis = commonAxis(points, state.scale);
    const of = new Map(points.map((point) => [point, layOut(point, axis)]));
    const all = [...of.values()];
    common = {key, axis, of, range: horizontalRange(all), logarithmic: wantsLogarithm(all)};
  }
  return common;
}

function pictures(now) {
  const runs = shown.filter(({points}) => points.length);
  const current = runs.map(({points}) => pointAt(points, now));
  const everything = commonLayout(runs.flatMap(({points}) => points));
  let {axis, of, range} = everything;
  if (state.hold === 'neither') {
    axis = commonAxis(current, state.scale);
    of = new Map(runs.flatMap(({points}, i) => [points[0], current[i]]).map((point) => [point, layOut(point, axis)]));
    range = horizontalRange(current.map((point) => of.get(point)));
  }
  // Decided for all steps at once, so that heights do not change their meaning while steps go by.
  const logarithmic = state.height === 'auto' ? everything.logarithmic : state.height === 'log';
  const vertical = verticalRange(state.hold === 'both' ? [...of.values()] : current.map((point) => of.get(point)), logarithmic);
  const width = pictureWidth(runs.length);
  const scale = {linear: '', log: ', logarithmic', symlog: ', symmetric logarithm'}[axis.scale];
  return make('div', {class: runs.length > 1 ? 'panels' : 'panels single'}, ...runs.map(({run, colour, points}, i) => {
    const point = current[i];
    const frame = {axis, range, vertical, label: point.label + scale, width};
    const ghost = state.ghost && point !== points[0] ? of.get(points[0]) : null;
    return panel(run, colour, point, now, spectrumPicture(of.get(point), ghost, frame,
        `${run}, ${point.name}, step ${point.step}: ${point.verdict}`));
  }));
}

/** Pixels across a picture, so that its letters are as large as all others; the numbers are those of style.css. */
function pictureWidth(count) {
  const inside = page.main.clientWidth - 22;
  const columns = Math.max(1, Math.floor((inside + 14) / (440 + 14)));
  const card = count === 1 ? Math.min(inside, 780) : (inside - 14 * (columns - 1)) / columns;
  return Math.max(card - 30, 300);
}

function panel(run, colour, point, now, picture) {
  const [badge, said] = point.agrees === true ? ['agrees', 'as predicted'] : point.agrees === false ?
      ['departs', 'departs'] : point.law ? ['undecided', 'not decided'] : ['undecided', 'no law'];
  const count = point.outlier_count;
  const beyond = count && point.agrees === true ? `, ${count} ${count === 1 ? 'outlier' : 'outliers'}` : '';
  const others = point.step === now ? '' : point.step < now ? ' (its latest so far)' : ' (its first)';
  const words = [...point.notes];
  if (point.outlier_count) {
    const listed = [...point.outliers].map((u) => number(value(point.axis, u), 4));
    const more = point.outlier_count - listed.length;
    words.push(`${point.outlier_count === 1 ? 'outlier' : 'outliers'}: ${listed.slice(0, 8).join(', ')}` +
        (listed.length > 8 || more > 0 ? ` and ${point.outlier_count - Math.min(listed.length, 8)} more` : ''));
  }
  for (const [kind, [distance, noise]] of Object.entries(point.distances)) {
    words.push(`${kind} ${number(distance)} (noise ${number(noise)})`);
  }
  const {dim, method, matvecs} = point.measured;
  words.push(`${dim.toLocaleString('en')} eigenvalues, ${method.split(' (')[0]}, ${matvecs.toLocaleString('en')} products`);
  return make('article', {class: 'card'},
      make('header', {}, make('i', {class: 'run-key', style: `background:${colour}`}), make('b', {}, runText(run)),
          make('span', {class: 'at'}, `step ${point.step.toLocaleString('en')}${others}`),
          make('span', {class: `badge ${badge}`}, said + beyond)),
      picture,
      make('p', {class: 'verdict'}, point.verdict),
      make('p', {class: 'small'}, words.join(' · ')),
      point.law ? make('details', {open: state.lawOpen, ontoggle: (event) => {
        state.lawOpen = event.target.open;
      }}, make('summary', {}, 'the law'),
          make('p', {}, point.law.reference || 'measured parts, combined as if free'),
          make('ul', {}, ...point.law.assumptions.map((text) => make('li', {}, text)))) : null);
}

// Pages of words.

function say(title, lines, ...more) {
  page.side.replaceChildren();
  page.main.replaceChildren(make('section', {class: 'empty'}, make('h1', {}, title),
      ...lines.map((line) => make('p', {}, line)), ...more));
}

function sayHowToBegin() {
  say('No spectra here yet', [
    'This tab shows the spectra that torch_rmt measures during training, each beside the law that theory predicts for it. ' +
    'No event file in this log directory holds one. To write some, with Lightning:',
  ],
  make('pre', {}, 'from torch_rmt.callbacks import SpectralMonitor\n\ntrainer = Trainer(callbacks=[SpectralMonitor()])'),
  make('p', {}, 'In a loop of your own:'),
  make('pre', {}, 'import torch_rmt as rmt\nfrom torch_rmt.sinks import TensorBoardSink\n\n' +
      'sink = TensorBoardSink("runs/mine")\nfor report in rmt.diagnose(model, (inputs, targets), loss).reports:\n' +
      '    sink.write(report, step)'),
  make('p', {}, 'Then press TensorBoard’s reload button. Runs of a torch_rmt before this tab existed have their figures under Images.'));
}
