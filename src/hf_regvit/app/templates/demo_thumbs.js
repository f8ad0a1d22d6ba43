element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  for (const each of element.querySelectorAll('button')) each.setAttribute('aria-pressed', each === button);
  trigger('select', {name: button.dataset.name});
});
