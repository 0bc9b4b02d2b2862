"""Which backend runs a call: checks, backends, operators, autograd.

`serve` decides how a call goes on, `operators` are those of torch and their gradients, `dispatch`
asks the `backends`, and `checks` says what is wrong with a call.
"""
