// Behavior of the maps of the demo. Gradio runs this script once, with the `element` that holds the maps and `trigger`
// for its events. A click on a map selects that place, and the mouse pointer marks the same place in all maps. The first
// image accepts arrow keys: the dot follows at once, the request is sent when the keys are idle, and the image keeps the
// focus when new results arrive.

const place = (event) => {
  const map = event.target.closest('.map:not(.empty)');
  if (!map) return null;
  const box = map.getBoundingClientRect();
  const inside = (v) => Math.min(Math.max(v, 0), 0.9999);
  return {x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height)};
};
const point = (at) => {
  const maps = element.querySelector('.maps');
  if (!maps) return;
  maps.classList.toggle('pointing', !!at);
  if (at) { maps.style.setProperty('--x', at.x * 100 + '%'); maps.style.setProperty('--y', at.y * 100 + '%'); }
};
element.addEventListener('click', (event) => { const at = place(event); if (at) trigger('select', at); });
element.addEventListener('mousemove', (event) => point(place(event)));
element.addEventListener('mouseleave', () => point(null));

const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
let cell = null, waiting = null, typing = false;
element.addEventListener('keydown', (event) => {
  const step = steps[event.key];
  if (!step || !event.target.matches('.map[tabindex]') || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const {rows, columns, row, column} = element.querySelector('.maps').dataset;
  const inside = (v, count) => Math.min(Math.max(v, 0), count - 1);
  const [r, c] = cell ?? [Number(row), Number(column)];
  cell = [inside(r + step[0], rows), inside(c + step[1], columns)];
  typing = true;
  const at = {x: (cell[1] + 0.5) / columns, y: (cell[0] + 0.5) / rows};
  point(at);
  clearTimeout(waiting);
  waiting = setTimeout(() => { waiting = null; trigger('select', at); }, 200);
});
document.addEventListener('focusin', (event) => { if (!element.contains(event.target)) typing = false; });
element.addEventListener('pointerdown', () => { typing = false; });

// B over A: the slider says which share of each map shows A. New results keep it, and the address shows them again.
let wiping = false, share = 50;
const wipe = () => {
  const maps = element.querySelector('.maps'), box = maps.querySelector('.wipe');
  maps.classList.toggle('wiping', !!box && wiping);
  maps.style.setProperty('--wipe', share + '%');
  if (box) { box.children[0].checked = wiping; box.children[1].value = share; }
};
element.addEventListener('input', (event) => {
  if (!event.target.closest('.wipe')) return;
  if (event.target.type === 'checkbox') wiping = event.target.checked; else { share = event.target.value; wiping = true; }
  wipe();
});

const spoken = document.createElement('div');
spoken.className = 'spoken';
spoken.setAttribute('role', 'status');
element.parentElement.append(spoken);
new MutationObserver(() => {
  const map = element.querySelector('.map[tabindex]');
  if (!map) return;
  wipe();
  const address = '?' + element.querySelector('.maps').dataset.address;
  if (address.length > 1 && address !== location.search) history.replaceState(history.state, '', address);
  const image = new URLSearchParams(address).get('image');
  for (const button of document.querySelectorAll('.thumbs button')) {
    button.setAttribute('aria-pressed', button.dataset.name === image);
  }
  if (waiting === null) cell = null;
  if (typing && document.activeElement !== map) map.focus({preventScroll: true});
  const said = [...element.querySelectorAll('.card')].map((card) => card.innerText).join('. ');
  if (said !== spoken.textContent) spoken.textContent = said;
}).observe(element, {childList: true, subtree: true, attributes: true, attributeFilter: ['class', 'data-address']});
