"""How a method holds its mask: hard masks, functions of dense weights, masks that learn."""
