-- Version 2: when the fence last opened after another region's term (or for the
-- first time), and the next transaction id at that moment. Local commits of lower
-- ids began before it and are never proposed.
CREATE TABLE quorate.opening (
    shard   text PRIMARY KEY,
    counter bigint NOT NULL,
    replica bigint NOT NULL,
    horizon bigint NOT NULL
);
REVOKE ALL ON quorate.opening FROM PUBLIC;
