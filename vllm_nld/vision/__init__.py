"""What images become before the network: their pixels, and the tokens that stand for them."""
