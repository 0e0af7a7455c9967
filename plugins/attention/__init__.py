"""How tokens see what came before."""
