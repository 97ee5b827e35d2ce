"""What keeps a run sound: steps left out, the way back, symptoms in words."""
