// Behavior of the pages: the block slider, copied commands, maps over their image, and enlarged maps and charts.
const slider = document.getElementById('layer');
slider?.addEventListener('input', () => {
  const layer = JSON.parse(slider.dataset.layers)[slider.value];
  slider.parentElement.querySelector('output').textContent = layer;
  for (const chart of document.querySelectorAll('.layer')) chart.hidden = chart.dataset.layer !== String(layer);
});

for (const button of document.querySelectorAll('.command button')) {
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = 'Copied';
  });
}

for (const example of document.querySelectorAll('.example')) {
  example.style.setProperty('--image', `url(${example.querySelector('img').src})`);
}
const opacity = document.getElementById('opacity');
opacity?.addEventListener('input', () => document.body.style.setProperty('--opacity', opacity.value / 100));

const dialog = document.querySelector('dialog');
for (const part of document.querySelectorAll('figure:has(.map), .chart')) {
  const enlarge = () => {
    dialog.replaceChildren(part.cloneNode(true));
    dialog.style.setProperty('--image', getComputedStyle(part).getPropertyValue('--image'));
    dialog.showModal();
  };
  part.tabIndex = 0;
  part.setAttribute('role', 'button');
  part.addEventListener('click', enlarge);
  part.addEventListener('keydown', (event) => { if (event.key === 'Enter') enlarge(); });
}
dialog.addEventListener('click', () => dialog.close());
