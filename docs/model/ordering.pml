/* ordering.pml: streams, votes and view changes of one configuration (docs/protocol.md sections 1, 3, 4 and 5).
 *
 * The model keeps what every judge would compute from the streams that exist (R4), and nothing of who has received what:
 * a correct member may act on anything that exists, at any later time, or never. README.md says what is left out.
 *
 * Settings:  N, QC, QV, VIEWS, SLOTS, EBAWA (rotating proposers and the blacklist; without it `minbft`),
 *            WINDOW (L: STABLEs open the window and logs may begin at one, K = 1; without it all slots are in the window).
 * Switches:  each leaves one rule out, and then pan must find a violation. They stand where the rule is applied.
 */
#ifndef N
#define N 3
#endif
#ifndef F
#define F 1
#endif
#ifndef QC
#define QC (F + 1)
#endif
#ifndef QV
#define QV (N - QC + 1)  /* Qc + Qv > n */
#endif
#ifndef VIEWS
#define VIEWS 3
#endif
#ifndef SLOTS
#define SLOTS 1
#endif
#ifdef WINDOW
#define L WINDOW
#else
#define L SLOTS
#endif
#ifdef LEADER_SKIPS_BLACKLIST
#define LEADERS 2  /* NEW-VIEWs of one view that can stand */
#else
#define LEADERS 1
#endif

/* Proposals for one (view, slot). R3 leaves one of them; which further one there is does not matter. */
#define KINDS 3
#define SKIP 0
#define FIRST 1
#define SECOND 2
#define NOTHING 0
#define NOOP 1
#define VALUE(g, k) ((k) == SKIP -> NOOP : 1 + 2 * (g) + (k))  /* every batch is another value */

/* An entry of a log O: the higher view wins as a number, too. */
#define ENTRY(g, value) ((g) * 16 + (value))
#define VIEW_OF(entry) ((entry) / 16)
#define VALUE_OF(entry) ((entry) % 16)

#define SIZE(set) (((set) & 1) + (((set) >> 1) & 1) + (((set) >> 2) & 1) + (((set) >> 3) & 1) + (((set) >> 4) & 1))
#define HAS(set, m) (((set) >> (m)) & 1)
#define ONLY(m) (1 << (m))
#define FAULTY(m) HAS(faulty, m)

typedef Stream {          /* what a judge knows of a member's stream: protocol section 3, "state" */
  byte v;                 /* highest VIEW-CHANGE target */
  byte e;                 /* view entered last */
  byte p;                 /* last slot proposed */
  bit branch;             /* which NEW-VIEW of e was entered: 0 unless a view can have two leaders */
  byte h;                 /* slot of the last STABLE */
  byte stables;           /* all of them, as a set of slots */
  byte e_at;              /* h when e was entered */
  byte best[SLOTS];       /* per slot the eligible entry of the highest view */
  byte at[SLOTS]          /* h when it was written: it comes after every STABLE up to that one */
};
typedef ViewChange {      /* the log O that it names */
  bit sent;
  byte h;
  byte e;
  bit branch;
  byte best[SLOTS]
};
typedef NewView {
  bit sent;
  byte blacklist;         /* N: nobody */
  byte h_star;
  byte s_max;
  byte S[SLOTS];          /* of slots above h* */
  byte voters             /* its leader and the COMMIT(NEW-VIEW)s */
};
Stream stream[N];
ViewChange change[N * VIEWS];
NewView newview[VIEWS * LEADERS];
byte votes[VIEWS * SLOTS * KINDS];  /* sets of members */
byte decided[SLOTS];
byte decided_in[SLOTS];             /* the lowest view that decided it */
byte faulty;                        /* the set of at most F members */

#define CHANGE(m, g) change[(m) * VIEWS + (g)]
#define NV(g, i) newview[(g) * LEADERS + (i)]
#define VOTES(g, s, k) votes[((g) * SLOTS + (s)) * KINDS + (k)]
#define VOTED(m, g, s) HAS(VOTES(g, s, SKIP) | VOTES(g, s, FIRST) | VOTES(g, s, SECOND), m)

/* Slots are counted from 0 here; p and s_max are counts, so that "s > p" reads s >= p. */
#ifdef EBAWA
#define BLACKLIST(g, i) ((g) == 0 -> N : NV(g, i).blacklist)
#define REST(s, b) ((s) % (N - 1) + ((s) % (N - 1) >= (b) -> 1 : 0))
#define PROPOSER_BUT(s, b) ((b) == N -> (s) % N : REST(s, b))
#define PROPOSER(g, i, s) PROPOSER_BUT((s) + 1, BLACKLIST(g, i))
#else
#define PROPOSER(g, i, s) ((g) % N)
#endif

/* ---- R1 to R3, as every judge applies them -------------------------------------------------------------------------- */
#ifdef VOTES_AFTER_VIEW_CHANGE
#define R1_STOPPED(m, g) false
#else
#define R1_STOPPED(m, g) (stream[m].v > (g))
#endif
#ifdef VOTES_WITHOUT_ENTERING
#define R1_ENTERED(m, g) true
#else
#define R1_ENTERED(m, g) ((g) == stream[m].e)
#endif
#ifdef NEW_VIEW_AFTER_VIEW_CHANGE
#define R1_NEW_VIEW(m, g) ((g) > stream[m].e)
#else
#define R1_NEW_VIEW(m, g) ((g) > stream[m].e && (g) >= stream[m].v)
#endif
#ifdef PROPOSES_TWICE
#define R3(m, s) true
#else
#define R3(m, s) ((s) >= stream[m].p)
#endif
#ifdef VOTES_BEYOND_WINDOW
#define R2(m, slots) true
#else
#define R2(m, slots) ((slots) <= stream[m].h + L)
#endif
#define R1(m, g) (R1_ENTERED(m, g) && !R1_STOPPED(m, g))
#define IS_PROPOSER(m, g, s) (PROPOSER(g, (g == stream[m].e -> stream[m].branch : 0), s) == (m))
/* What a correct member keeps to beyond the rules ("Sending"): the view it is in, one vote a slot and view. */
#define SENDS(m, g, s) (FAULTY(m) || (g) == stream[m].e && stream[m].v <= (g) && (s) >= stream[m].h && !VOTED(m, g, s))

/* ---- what follows from a message ------------------------------------------------------------------------------------ */
hidden byte i, j, h_star, s_max, e_max, branch, blamed, top;
hidden byte S[SLOTS];

inline say(value) {
  if
  :: value == NOTHING -> printf("nothing")
  :: value == NOOP -> printf("no-op")
  :: else -> printf("%c%d", (value % 2 == 0 -> 'x' : 'y'), (value - 2) / 2)
  fi
}

inline who(m) {
  if
  :: FAULTY(m) -> printf("  member %d (faulty): ", m)
  :: else -> printf("  member %d: ", m)
  fi
}

/* Slot s has the value in view g, for whoever reads these streams. */
inline decide(g, s, value) {
  printf("      => slot %d is decided in view %d: ", s + 1, g); say(value); printf("\n");
  if
  :: decided[s] != NOTHING && decided[s] != value -> printf("VIOLATION: agreement on slot %d\n", s + 1); assert(false)
  :: else
  fi;
  if
  :: decided[s] == NOTHING || decided_in[s] > g -> decided_in[s] = g
  :: else
  fi;
  decided[s] = value;
  for (i : g * LEADERS + LEADERS .. VIEWS * LEADERS - 1) {
    if
    :: newview[i].sent && s >= newview[i].h_star && newview[i].S[s] != value ->
      printf("VIOLATION: NEW-VIEW(%d) has lost slot %d\n", i / LEADERS, s + 1); assert(false)
    :: else
    fi
  }
}

inline eligible(m, g, s, value) {
  if
  :: ENTRY(g, value) > stream[m].best[s] -> stream[m].best[s] = ENTRY(g, value); stream[m].at[s] = stream[m].h
  :: else
  fi
}

inline vote(m, g, s, k) {
  VOTES(g, s, k) = VOTES(g, s, k) | ONLY(m);
  if
  :: g == stream[m].e -> eligible(m, g, s, VALUE(g, k))
  :: else  /* only with VOTES_WITHOUT_ENTERING: counted by who sees it, not eligible in the log */
  fi;
  if
  :: SIZE(VOTES(g, s, k)) >= QC -> decide(g, s, VALUE(g, k))
  :: else
  fi
}

inline propose(m, g, s, k) {
  who(m); if :: k == SKIP -> printf("SKIP") :: else -> printf("PREPARE") fi;
  printf("(view %d, slot %d) ", g, s + 1); say(VALUE(g, k)); printf("\n");
  stream[m].p = s + 1;
  vote(m, g, s, k);
#ifdef SKIP_LEARNED_EARLY
  if
  :: k == SKIP -> decide(g, s, NOOP)
  :: else
  fi
#endif
}

inline commit(m, g, s, k) {
  who(m); printf("COMMIT(view %d, slot %d) ", g, s + 1); say(VALUE(g, k)); printf("\n");
#ifdef OWN_COMMIT_COUNTS
  if
  :: HAS(VOTES(g, s, k), m) -> decide(g, s, VALUE(g, k))  /* two messages, one member */
  :: else
  fi;
#endif
#ifdef COMMITS_NOT_ELIGIBLE
  top = stream[m].best[s];
  vote(m, g, s, k);
  stream[m].best[s] = top
#else
  vote(m, g, s, k)
#endif
}

/* What a log that starts at STABLE(from) holds of slot s. */
#ifdef STABLE_WITHOUT_VIEW
#define VIEW_KNOWN(m, from, s) (VIEW_OF(stream[m].best[s]) != stream[m].e || stream[m].e == 0 || stream[m].e_at >= (from))
#else
#define VIEW_KNOWN(m, from, s) true
#endif
#define IN_LOG(m, from, s) (stream[m].at[s] >= (from) && VIEW_KNOWN(m, from, s))

inline view_change(m, g, from, hidden_log) {
  who(m); printf("VIEW-CHANGE(%d)", g);
  if :: hidden_log -> printf(" with an empty log") :: else fi;
  if :: from > 0 -> printf(" with its log from STABLE(%d)", from) :: else fi;
  printf("\n");
  stream[m].v = g;
  CHANGE(m, g).sent = 1;
  CHANGE(m, g).h = stream[m].h;
  CHANGE(m, g).e = stream[m].e;
  CHANGE(m, g).branch = stream[m].branch;
  for (i : 0 .. SLOTS - 1) { CHANGE(m, g).best[i] = (!hidden_log && IN_LOG(m, from, i) -> stream[m].best[i] : NOTHING) }
}

inline stable(m, x) {
  who(m); printf("STABLE(%d)\n", x);
  stream[m].h = x;
  stream[m].stables = stream[m].stables | ONLY(x)
}

/* S, s_max and the blacklist, recomputed by everyone from the VIEW-CHANGEs of the members in q (section 5, steps 3 and 4). */
inline merge(g, q) {
  h_star = 0; e_max = 0; branch = 0;
  for (j : 0 .. N - 1) {
    if
    :: HAS(q, j) && CHANGE(j, g).h > h_star -> h_star = CHANGE(j, g).h
    :: else
    fi
  }
  s_max = h_star;
  for (i : 0 .. SLOTS - 1) {
    top = NOTHING;
    for (j : 0 .. N - 1) {
      if
#ifdef LOWEST_VIEW
      :: HAS(q, j) && CHANGE(j, g).best[i] && (top == NOTHING || CHANGE(j, g).best[i] < top) -> top = CHANGE(j, g).best[i]
#else
      :: HAS(q, j) && CHANGE(j, g).best[i] > top -> top = CHANGE(j, g).best[i]
#endif
      :: else
      fi
    }
    S[i] = (i < h_star -> NOTHING : VALUE_OF(top));
    if
    :: S[i] -> s_max = i + 1
    :: else
    fi
  }
  for (i : 0 .. SLOTS - 1) {
    if
    :: i >= h_star && i < s_max && S[i] == NOTHING -> S[i] = NOOP
    :: else
    fi
  }
  for (j : 0 .. N - 1) {
    if
    :: HAS(q, j) && CHANGE(j, g).e >= e_max -> e_max = CHANGE(j, g).e; branch = CHANGE(j, g).branch
    :: else
    fi
  }
#ifdef EBAWA
  blamed = (e_max == 0 -> 0 : NV(e_max, branch).s_max);  /* the lowest slot without a proposal of e_max */
  blamed = (blamed < h_star -> h_star : blamed);
  for (i : blamed .. SLOTS - 1) {
    top = 0;
    for (j : 0 .. N - 1) {
      if
      :: HAS(q, j) && CHANGE(j, g).best[i] && VIEW_OF(CHANGE(j, g).best[i]) == e_max -> top = 1
      :: else
      fi
    }
    if
    :: blamed == i && top -> blamed = i + 1
    :: else
    fi
  }
  blamed = PROPOSER(e_max, branch, blamed);  /* f = 1: the new one pushes the old one out */
#endif
}

inline enter(m, g, i_nv) {
  stream[m].e = g;
  stream[m].e_at = stream[m].h;
  stream[m].branch = i_nv;
  stream[m].p = NV(g, i_nv).s_max;
  NV(g, i_nv).voters = NV(g, i_nv).voters | ONLY(m);
  for (j : NV(g, i_nv).h_star .. NV(g, i_nv).s_max - 1) {
#ifndef NEW_VIEWS_NOT_ELIGIBLE
    eligible(m, g, j, NV(g, i_nv).S[j]);
#endif
    if
    :: SIZE(NV(g, i_nv).voters) >= QC -> decide(g, j, NV(g, i_nv).S[j])
    :: else
    fi
  }
}

/* NEW-VIEW(g) of m with the S just computed */
inline new_view(m, g, q) {
  who(m); printf("NEW-VIEW(%d) from set %d, blacklists %d: S =", g, q, blamed);
  for (i : 0 .. SLOTS - 1) { printf(" "); say(S[i]) }
  if :: h_star -> printf(" above h* = %d", h_star) :: else fi;
  printf("\n");
  branch = (NV(g, 0).sent -> LEADERS - 1 : 0);
  NV(g, branch).sent = 1;
  NV(g, branch).h_star = h_star;
  NV(g, branch).s_max = s_max;
  NV(g, branch).blacklist = blamed;
  for (i : 0 .. SLOTS - 1) {
    NV(g, branch).S[i] = S[i];
    if
    :: i >= h_star && decided[i] != NOTHING && decided_in[i] < g && S[i] != decided[i] ->
      printf("VIOLATION: NEW-VIEW(%d) has lost slot %d\n", g, i + 1); assert(false)
    :: else
    fi
  }
  enter(m, g, branch)
}

inline commit_new_view(m, g, i_nv) {
  who(m); printf("COMMIT(NEW-VIEW(%d))\n", g);
  enter(m, g, i_nv)
}

/* ---- the moves of one member: each is one message at the end of its stream ------------------------------------------- */
/* A message that breaks R1 to R3 would end its sender's stream: it is left out, since a stream that has ended is worth
 * what a silent one is worth, and a faulty member may be silent. */
#ifdef EBAWA
#define MAY_SKIP true
#else
#define MAY_SKIP false
#endif
#define PROPOSE(g, s) \
  :: d_step { g < VIEWS && s < SLOTS && R1(m, g) && R2(m, s + 1) && R3(m, s) && VOTES(g, s, FIRST) == 0 && IS_PROPOSER(m, g, s) && SENDS(m, g, s) -> propose(m, g, s, FIRST); skip } \
  :: d_step { MAY_SKIP && g < VIEWS && s < SLOTS && R1(m, g) && R2(m, s + 1) && R3(m, s) && VOTES(g, s, SKIP) == 0 && IS_PROPOSER(m, g, s) && SENDS(m, g, s) -> propose(m, g, s, SKIP); skip }
#define PROPOSE_AGAIN(g, s) \
  :: d_step { g < VIEWS && s < SLOTS && R1(m, g) && R2(m, s + 1) && R3(m, s) && VOTES(g, s, FIRST) != 0 && VOTES(g, s, SECOND) == 0 && IS_PROPOSER(m, g, s) && SENDS(m, g, s) -> propose(m, g, s, SECOND); skip }
#ifdef OWN_COMMIT_COUNTS
#define NOT_YET(m, g, s, k) (!HAS(VOTES(g, s, k), m) || FAULTY(m) && SIZE(VOTES(g, s, k)) == 1)
#elif defined(BARE_COMMITS)
#define NOT_YET(m, g, s, k) (!HAS(VOTES(g, s, k), m) && (k != SECOND || FAULTY(m)))  /* a correct one has the PREPARE */
#else
#define NOT_YET(m, g, s, k) (!HAS(VOTES(g, s, k), m))
#endif
#define COMMIT(g, s, k) \
  :: d_step { g < VIEWS && s < SLOTS && R1(m, g) && R2(m, s + 1) && VOTES(g, s, k) != 0 && NOT_YET(m, g, s, k) && SENDS(m, g, s) -> commit(m, g, s, k); skip }
#define BARE_COMMIT(g, s) \
  :: d_step { g < VIEWS && s < SLOTS && R1(m, g) && FAULTY(m) && VOTES(g, s, SECOND) == 0 -> commit(m, g, s, SECOND); skip }
#define VIEW_CHANGE(g) \
  :: d_step { g < VIEWS && g > stream[m].v && (FAULTY(m) || g > stream[m].e) -> view_change(m, g, 0, false); skip }
#ifdef LOG_FROM_LAST_STABLE
#define ANCHOR(m, from) (HAS(stream[m].stables, from) && (from) <= stream[m].h)
#else
#define ANCHOR(m, from) (HAS(stream[m].stables, from) && (from) + L <= stream[m].h)
#endif
#define TRUNCATED(g, from) \
  :: d_step { g < VIEWS && g > stream[m].v && (FAULTY(m) || g > stream[m].e) && ANCHOR(m, from) -> view_change(m, g, from, false); skip }
/* Its certificate: f + 1 CHECKPOINTs, so a correct member has decided every slot up to it. */
#define STABLE(x) \
  :: d_step { x <= SLOTS && x > stream[m].h && decided[0] && (x < 2 || decided[1 % SLOTS]) && (x < 3 || decided[2 % SLOTS]) -> stable(m, x); skip }
#define HIDE_LOG(g) \
  :: d_step { g < VIEWS && FAULTY(m) && g > stream[m].v -> view_change(m, g, 0, true); skip }
#define SENT_BY(q, j, g) (!HAS(q, j) || CHANGE(j % N, g).sent)
#define SENT(q, g) (SENT_BY(q, 0, g) && SENT_BY(q, 1, g) && SENT_BY(q, 2, g) && SENT_BY(q, 3, g) && SENT_BY(q, 4, g))
#define MAY_NEW_VIEW(g, q) (g < VIEWS && R1_NEW_VIEW(m, g) && SENT(q, g) && (FAULTY(m) || stream[m].v == (g)))
#ifdef LEADER_SKIPS_BLACKLIST
/* the leader is named by the blacklist of the highest view entered in its VIEW-CHANGEs */
#define TOP_E(q, g) (HAS(q, 0) && CHANGE(0, g).e || HAS(q, 1) && CHANGE(1, g).e || HAS(q, 2) && CHANGE(2, g).e)
#define LEADER(g, q) ((g) % N == (TOP_E(q, g) -> NV(1, 0).blacklist : N) -> ((g) + 1) % N : (g) % N)
#define ROOM(g) (!NV(g, 1).sent)
#else
#define LEADER(g, q) ((g) % N)
#define ROOM(g) true
#endif
#define NEW_VIEW(g, q) \
  :: d_step { MAY_NEW_VIEW(g, q) && LEADER(g, q) == m && ROOM(g) -> merge(g, q); \
    if \
    :: R2(m, s_max) && (FAULTY(m) || h_star <= stream[m].h) -> new_view(m, g, q) \
    :: else  /* not before its own STABLE(h*) */ \
    fi; \
    skip }
#define BOGUS_NEW_VIEW(g) \
  :: d_step { g < VIEWS && FAULTY(m) && (g) % N == m && R1_NEW_VIEW(m, g) -> merge(g, 0); new_view(m, g, 0); skip }
#define COMMIT_NEW_VIEW(g, i) \
  :: d_step { g < VIEWS && i < LEADERS && R1_NEW_VIEW(m, g) && NV(g, i).sent && R2(m, NV(g, i).s_max) && (FAULTY(m) || g >= stream[m].v && NV(g, i).h_star <= stream[m].h) -> commit_new_view(m, g, i); skip }

#if SLOTS > 2
#define EACH_SLOT(ACTION, g) ACTION(g, 0) ACTION(g, 1) ACTION(g, 2)
#define EACH_COMMIT(g) EACH_KIND(g, 0) EACH_KIND(g, 1) EACH_KIND(g, 2)
#else
#define EACH_SLOT(ACTION, g) ACTION(g, 0) ACTION(g, 1)
#define EACH_COMMIT(g) EACH_KIND(g, 0) EACH_KIND(g, 1)
#endif
#define EACH_KIND(g, s) COMMIT(g, s, SKIP) COMMIT(g, s, FIRST) COMMIT(g, s, SECOND)
#if N == 5
#define EACH_QUORUM(g) NEW_VIEW(g, 7) NEW_VIEW(g, 11) NEW_VIEW(g, 13) NEW_VIEW(g, 14) NEW_VIEW(g, 19) NEW_VIEW(g, 21) \
  NEW_VIEW(g, 22) NEW_VIEW(g, 25) NEW_VIEW(g, 26) NEW_VIEW(g, 28)
#elif N == 4 && QV == 3
#define EACH_QUORUM(g) NEW_VIEW(g, 7) NEW_VIEW(g, 11) NEW_VIEW(g, 13) NEW_VIEW(g, 14)
#elif N == 4
#define EACH_QUORUM(g) NEW_VIEW(g, 3) NEW_VIEW(g, 5) NEW_VIEW(g, 6) NEW_VIEW(g, 9) NEW_VIEW(g, 10) NEW_VIEW(g, 12)
#elif QV == 1
#define EACH_QUORUM(g) NEW_VIEW(g, 1) NEW_VIEW(g, 2) NEW_VIEW(g, 4)
#else
#define EACH_QUORUM(g) NEW_VIEW(g, 3) NEW_VIEW(g, 5) NEW_VIEW(g, 6)
#endif
#define EACH_CHANGE(g) VIEW_CHANGE(g) EACH_QUORUM(g) COMMIT_NEW_VIEW(g, 0)

proctype member(byte m) {
end:
  do
  EACH_SLOT(PROPOSE, stream[m].e)
  EACH_COMMIT(stream[m].e)
  EACH_CHANGE(1)
#if VIEWS > 2
  EACH_CHANGE(2)
#endif
#ifdef WINDOW
  STABLE(1)
  STABLE(2)
  TRUNCATED(1, 1)
  TRUNCATED(2, 1)
  TRUNCATED(1, 2)
  TRUNCATED(2, 2)
#endif
#ifdef PROPOSES_TWICE
  EACH_SLOT(PROPOSE_AGAIN, stream[m].e)
#endif
#ifdef VOTES_WITHOUT_ENTERING
  EACH_SLOT(PROPOSE, 1)
  EACH_COMMIT(1)
#endif
#ifdef BARE_COMMITS
  EACH_SLOT(BARE_COMMIT, stream[m].e)
#endif
#ifdef LOG_NOT_CONTIGUOUS
  HIDE_LOG(1)
#endif
#ifdef NEW_VIEW_NOT_RECOMPUTED
  BOGUS_NEW_VIEW(1)
#endif
#ifdef LEADER_SKIPS_BLACKLIST
  EACH_SLOT(PROPOSE_AGAIN, stream[m].e)  /* by the proposer that the other leader's NEW-VIEW names */
  COMMIT_NEW_VIEW(1, 1)
  COMMIT_NEW_VIEW(2, 1)
#endif
  od
}

init {
  atomic {
    select (i : 0 .. N - 1);
    faulty = ONLY(i);
#if F == 2
    select (i : 0 .. N - 1);  /* or the same one again: fewer are faulty */
    faulty = faulty | ONLY(i);
#endif
    for (i : 0 .. N - 1) { run member(i) }
  }
}
