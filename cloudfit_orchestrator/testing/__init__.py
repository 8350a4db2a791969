"""First-class fakes: a deterministic simulation of whole replica groups, and the checker of the histories it makes."""
