const slider = document.getElementById('layer');
const numbers = JSON.parse(slider.dataset.layers);
slider.addEventListener('input', () => {
  const layer = numbers[slider.value];
  slider.parentElement.querySelector('output').textContent = layer;
  for (const chart of document.querySelectorAll('.layer')) chart.hidden = chart.dataset.layer !== String(layer);
});
