"""AMQP 0-9-1: a codec without I/O, and channels and connections on the hub.

From the bottom up, each module knowing only those before it:

* `errors`, `methods`, `values`: what can go wrong, the methods as data, values as bytes.
* `protocol`, `frames`, `message`: bytes in, events out; messages in, bytes out.  No socket, clock
  or hub.
* `handshake`, `heartbeat`: decisions without I/O: the opening dialogue, when to give a peer up.
* `rpc`, `confirms`, `gate`, `inbox`, `table`: who waits for which reply, which confirm, which room;
  what waits to be drained; which channel has which number.
* `options`, `tls`, `sockview`: what can be set, and what may be done with the socket.
* `requests`, `consuming`, `publishing`, `channel`: a channel and its parts.
* `opening`, `interface`, `connection`: a connection and its parts.

`greenkombu.transport.pyamqp` makes a transport of it.
"""
