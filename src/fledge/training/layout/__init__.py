"""How a run is divided among processes and devices."""
