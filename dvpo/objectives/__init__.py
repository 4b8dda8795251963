"""The equations: pure functions on tensors.

Index convention, used everywhere. One forward pass of a value model over [x, y] reads h_0..h_T: h_0 at the last prompt
token, h_t at response token y_t. So V(s_t) = h_{t-1} (before the action) and Q(s_t, a_t) = h_t (after it).
A tensor of h_0..h_T carries the suffix `_B_S` with S = T + 1; one of the T actions carries `_B_T`.
"""
