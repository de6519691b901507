"""Images: what they become before the network, and the network that reads them."""
