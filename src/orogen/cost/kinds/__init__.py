"""What each kind of layer computes, holds and sends: one `LayerCosts` for each, from the configs alone."""
