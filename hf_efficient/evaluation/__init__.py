"""How close a converted model stayed to its source: `verify`, fidelity, controls and cost."""
